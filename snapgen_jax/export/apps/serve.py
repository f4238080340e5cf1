"""Serves the browser app that it lies in: `python serve.py`, then open the address that it prints.

A page needs a server: a browser gives a file on disk neither workers nor WebAssembly. GPU, cache and threads are for
pages of this machine (localhost) or of https; `--host=0.0.0.0` lets a phone in the same network draw too, on its CPU.
This file is copied into every browser app, and needs Python alone.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import pathlib
import sys
import webbrowser
from typing import ClassVar

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".npy": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".tflite": "application/octet-stream",
    ".wasm": "application/wasm",
}
# As in index.html; a worker obeys the header of its own file alone.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser asks whether a file has changed
}
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with the right types and headers."""

    extensions_map: ClassVar[dict[str, str]] = {**http.server.SimpleHTTPRequestHandler.extensions_map, **TYPES}
    extra_headers: ClassVar[dict[str, str]] = {}

    def end_headers(self) -> None:
        for name, value in {**HEADERS, **self.extra_headers}.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: str) -> None:
        self.send_error(404, "No such file")

    def log_message(self, format: str, *args: object) -> None:
        pass


def server(folder: pathlib.Path, host: str, port: int, threads: bool = False) -> http.server.ThreadingHTTPServer:
    """A server of a folder; port 0 takes any that is free. With `threads`, pages may use threads of WebAssembly."""
    handler = type("Handler", (Handler,), {"extra_headers": ISOLATED if threads else {}})
    return http.server.ThreadingHTTPServer((host, port), functools.partial(handler, directory=str(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Open this app in a browser.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    parser.add_argument("--threads", action="store_true", help="let WebAssembly use several cores")
    parser.add_argument("--open", action="store_true", help="also open the page in the browser of this machine")
    options = parser.parse_args()
    try:
        httpd = server(pathlib.Path(__file__).resolve().parent, options.host, options.port, options.threads)
    except OSError as error:
        print(f"port {options.port} cannot be used ({error.strerror}); give another, as --port=8001", file=sys.stderr)
        return 1
    address = f"http://{'localhost' if options.host in ('127.0.0.1', '0.0.0.0') else options.host}:{httpd.server_port}/"
    print(f"open {address} in a browser; Ctrl+C ends it", flush=True)
    if options.open:
        webbrowser.open(address)
    try:
        httpd.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        httpd.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
