"""`snapgen export --app=web`: what is written, what is refused, and how it is served. No browser is needed."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from etils import epath

from snapgen_jax import quickstart
from snapgen_jax.cli import main
from snapgen_jax.export.apps import litertjs, serve, web, write_app
from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.training.exits import ConfigError, ExitCode

from .conftest import PROMPTS, resign


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path_factory):
    """A folder in LiteRT.js's place, of the same files, each a line long."""
    folder = tmp_path_factory.mktemp("litertjs")
    for place in ("core/dist", "core/wasm", "wasm-utils/dist"):
        (folder / place).mkdir(parents=True)
    code = 'import {\n  createWasmLib\n} from "@litertjs/wasm-utils";\nexport { createWasmLib };\n'
    (folder / "core/dist/index.js").write_text(f"{code}//# sourceMappingURL=index.js.map")
    (folder / "wasm-utils/dist/index.js").write_text("export const createWasmLib = 1;\n")
    for build in web.BUILDS:
        (folder / f"core/wasm/{build}.js").write_text("// loader")
        (folder / f"core/wasm/{build}.wasm").write_bytes(b"\0asm")
    monkeypatch.setattr(web, "litert_js", lambda: folder)
    return folder


@pytest.fixture
def app(small_bundle, tmp_path):
    return write_app("web", small_bundle, tmp_path / "app")


def test_an_app_holds_the_bundle_and_says_what_it_runs_on(app, small_bundle):
    listed = json.loads((small_bundle / "manifest.json").read_text())["files"]
    assert {path.relative_to(app / "bundle").as_posix() for path in (app / "bundle").rglob("*") if path.is_file()} == {
        "manifest.json",
        *listed,
    }
    images = LiteRTGenerator(app / "bundle").generate(PROMPTS[:1])
    np.testing.assert_array_equal(images, LiteRTGenerator(small_bundle).generate(PROMPTS[:1]))
    page = (app / "README.md").read_text()
    assert litertjs.version() in page and "Apache License 2.0" in page and "python serve.py" in page
    for name in re.findall(r"`([a-z]+\.(?:js|css|html|py))`", page):
        assert (app / name).is_file(), name
    assert "Apache License" in (app / "litert" / "LICENSE").read_text()


def test_the_library_finds_its_other_half_and_says_that_it_was_changed(app):
    code = (app / "litert" / "index.js").read_text()
    assert code.startswith("// Changed by snapgen_jax") and '"./wasm-utils.js"' in code and "sourceMapping" not in code


def test_no_script_stands_in_the_page_and_nothing_comes_from_elsewhere():
    page = (web.TEMPLATE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son[a-z]+=|<style|\sstyle=", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert f"{policy}; frame-ancestors 'none'" == serve.POLICY and "unsafe-inline" not in policy
    for path in web.TEMPLATE.glob("*.*"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org", "")
        assert "http:" not in text and "https:" not in text, path.name


def test_an_app_is_replaced_and_anything_else_is_not(app, small_bundle):
    (app / "old.js").write_text("")
    write_app("web", small_bundle, app)
    assert not (app / "old.js").exists() and (app / "page.js").exists()
    (app / "app.json").unlink()
    with pytest.raises(ConfigError, match="is no web app"):
        write_app("web", small_bundle, app)
    assert (app / "page.js").exists()


def _file(tmp_path, bundle):
    (tmp_path / "file").write_text("")
    return bundle, tmp_path / "file"


def _inside(tmp_path, bundle):
    return bundle, bundle / "app"


def _around(tmp_path, bundle):
    return bundle, bundle.parent


def _no_bundle(tmp_path, bundle):
    return tmp_path, tmp_path / "app"


def _older(tmp_path, bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 3}))
    return bundle, tmp_path / "app"


def _newer(tmp_path, bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    return bundle, tmp_path / "app"


def _gone(tmp_path, bundle):
    (bundle / "unet_f32.tflite").unlink()
    return bundle, tmp_path / "app"


def _leaving(tmp_path, bundle):
    (tmp_path / "secret").write_text("")
    resign(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": ""}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle, tmp_path / "app"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (_file, "is a file"),
        (_inside, "in each other"),
        (_around, "in each other"),
        (_no_bundle, "no manifest.json"),
        (_older, "schema 3, and the page needs 4"),
        (_newer, "newer than its client"),
        (_gone, "no such file"),
        (_leaving, "no such file"),
    ],
)
def test_what_cannot_be_an_app_is_refused_and_nothing_is_left(case, message, small_bundle, tmp_path):
    bundle = pathlib.Path(shutil.copytree(small_bundle, tmp_path / "b" / "bundle"))
    source, out = case(tmp_path, bundle)
    with pytest.raises(ConfigError, match=message):
        write_app("web", source, out)
    assert not (tmp_path / "app").exists() and not list(tmp_path.glob(".*partial*"))


def test_the_command_wraps_a_bundle(small_bundle, tmp_path, capsys):
    assert main(["export", f"--bundle={small_bundle}", "--app=web", f"--out={tmp_path}/app"]) == 0
    assert f"python {tmp_path}/app/serve.py" in capsys.readouterr().out
    assert (tmp_path / "app" / "bundle" / "unet_f32.tflite").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle={bundle}"], "--bundle goes with --app"),
        (["--bundle={bundle}", "--app=web", "--sizes=64x64", "--title=x"], "--sizes, --title goes with --workdir"),
        (["--bundle={bundle}", "--app=web", "--out={bundle}/x"], "in each other"),
        (["--bundle={bundle}", "--app=web", "--out=gs://bucket/app"], "made of local files"),
        (["--workdir={bundle}", "--app=web", "--out={bundle}/golden"], "is no web app"),
    ],
)
def test_the_command_says_what_does_not_go_together(arguments, message, small_bundle, capsys):
    filled = [argument.format(bundle=small_bundle) for argument in arguments]
    assert main(["export", *filled]) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err


def test_the_command_exports_a_run_and_wraps_it(small_bundle, tmp_path, monkeypatch, capsys):
    asked = []

    def export_run(workdir, out, *_, **__):
        asked.append(workdir)
        shutil.copytree(small_bundle, out)
        return {"export.bytes_f32": 1.0}

    monkeypatch.setattr("snapgen_jax.export.run.export_run", export_run)
    monkeypatch.setattr("snapgen_jax.lazy_schedules.for_bundle", lambda *_, **__: ({}, {}))  # which reads the run
    assert main(["export", f"--workdir={tmp_path}/run", "--app=web"]) == 0
    assert asked == [f"{tmp_path}/run"] and "export.bytes_f32" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run" / "export").iterdir()) == ["web"]
    assert (tmp_path / "run" / "export" / "web" / "bundle" / "manifest.json").is_file()


def test_without_npm_or_network_the_command_says_so_and_writes_nothing(small_bundle, tmp_path, monkeypatch, capsys):
    def run(arguments, folder):
        return subprocess.CompletedProcess(
            arguments, 1, "", "npm error code EAI_AGAIN\nnpm error syscall getaddrinfo\n"
        )

    monkeypatch.setattr(litertjs, "_run", run)
    monkeypatch.setattr(litertjs, "PLACE", tmp_path / "nowhere")
    monkeypatch.setattr(web, "litert_js", litertjs.litert_js)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["export", f"--bundle={small_bundle}", "--app=web", f"--out={tmp_path}/app"]) == ExitCode.INFRASTRUCTURE
    assert "EAI_AGAIN" in (said := capsys.readouterr().err) and "network" in said
    assert not (tmp_path / "app").exists() and not list((tmp_path / "cache" / "snapgen_jax").iterdir())


def test_the_library_is_installed_once_and_again_when_the_lock_changes(tmp_path, monkeypatch):
    runs = []

    def run(arguments, folder):
        assert sorted(path.name for path in folder.iterdir()) == ["package-lock.json", "package.json"]
        runs.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(litertjs, "_run", run)
    litertjs.install(tmp_path / "node")
    assert litertjs.install(tmp_path / "node") == tmp_path / "node" / "node_modules" / "@litertjs"
    assert len(runs) == 1 and runs[0][0] == "ci"
    (tmp_path / "node" / "lock.sha256").write_text("another")
    litertjs.install(tmp_path / "node")
    assert len(runs) == 2
    lock = json.loads((litertjs.LOCK / "package-lock.json").read_text())["packages"]
    assert lock["node_modules/@litertjs/core"]["version"] == litertjs.version()
    assert all(part["integrity"].startswith("sha512-") for name, part in lock.items() if name)


@pytest.fixture(params=[False, True], ids=["plain", "threads"])
def served(request, app):
    httpd = serve.server(app, "127.0.0.1", 0, threads=request.param)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/", request.param
    httpd.shutdown()
    httpd.server_close()


def test_files_are_served_with_their_types_and_a_strict_policy(served):
    address, threads = served
    for name, kind in (
        ("", "text/html"),
        ("worker.js", "text/javascript"),
        ("bundle/manifest.json", "application/json"),
    ):
        with urllib.request.urlopen(address + name) as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            assert "script-src 'self' 'wasm-unsafe-eval'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert (answer.headers["Cross-Origin-Opener-Policy"] == "same-origin") == threads
            assert (answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp") == threads
    with urllib.request.urlopen(address + "litert/litert_wasm_internal.wasm") as answer:
        assert answer.headers["Content-Type"] == "application/wasm"


@pytest.mark.parametrize("name", ["bundle/", "../secret", "%2e%2e/secret", "no.js"])
def test_folders_and_what_lies_outside_are_not_served(served, app, name):
    (app.parent / "secret").write_text("secret")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(served[0] + name)
    assert error.value.code == 404


def test_the_copied_server_runs_alone_and_says_what_a_taken_port_needs(served, app):
    port = served[0].rstrip("/").rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-I", app / "serve.py", f"--port={port}"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "give another, as --port=8001" in done.stderr
    process = subprocess.Popen([sys.executable, "-I", app / "serve.py", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://localhost:\d+/", process.stdout.readline())[0]
        with urllib.request.urlopen(address.replace("localhost", "127.0.0.1")) as answer:
            assert b"<canvas" in answer.read()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def test_the_package_ships_the_page(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path}", "build_py", f"-d{tmp_path}/lib"]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    for source in (*web.TEMPLATE.rglob("*.*"), *litertjs.LOCK.iterdir(), web.SERVER):
        assert (tmp_path / "lib" / source.relative_to(root)).is_file(), source


def test_the_quickstart_writes_its_page_and_says_why_where_it_cannot(small_bundle, tmp_path, monkeypatch, capsys):
    workdir = epath.Path(tmp_path)
    shutil.copytree(small_bundle, tmp_path / "export" / "bundle")
    assert quickstart._write_page(workdir) and (tmp_path / "export" / "web" / "index.html").is_file()
    closing = quickstart._closing(workdir, {"minutes": 1.0, "score.overall": 0.5}, True)
    assert f"python3 {tmp_path}/export/web/serve.py" in closing

    def fail():
        raise litertjs.UnavailableError("no network")

    monkeypatch.setattr(web, "litert_js", fail)
    assert not quickstart._write_page(workdir)
    assert "no browser app was written: no network" in capsys.readouterr().out
    assert (tmp_path / "export" / "web" / "index.html").is_file(), "the one from before"
    assert "serve.py" not in quickstart._closing(workdir, {"minutes": 1.0, "score.overall": 0.5}, False)
