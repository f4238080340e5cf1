"""A page in headless Chromium, driven by the DevTools protocol over a pipe: nothing to install but the browser."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser reads commands from file 3 and writes answers to file 4.
START = """
import fcntl, os, sys
first, second = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(first, 3), os.dup2(second, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--use-vulkan=swiftshader")


class PageError(AssertionError):
    """The page threw, or did not come to what was waited for."""


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.console: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._browser.send(method, self._session, timeout, **parameters)

    def open(self, address: str) -> None:
        """Goes to an address, and does not wait."""
        self.send("Page.navigate", url=address)

    def evaluate(self, code: str, timeout: float = 60) -> Any:
        """The value of an expression; of a promise, what it becomes."""
        found = self.send("Runtime.evaluate", timeout, expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise PageError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def wait(self, condition: str, timeout: float = 60) -> Any:
        """The first true value of an expression."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if value := self.evaluate(condition):
                return value
            time.sleep(0.05)
        raise PageError(f"not true within {timeout} s: {condition}\n{self.text()}\n" + "\n".join(self.console[-20:]))

    def text(self) -> str:
        """What stands on the page."""
        return self.evaluate("document.body ? document.body.innerText : ''")

    def screenshot(self, path: pathlib.Path, width: int, height: int, dark: bool = False) -> None:
        """A PNG of the page in a window of this size."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


class Browser:
    """Chromium; see `launch`."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._numbers, self._buffer = itertools.count(1), b""
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        """A new tab."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._pages[session] = page = Page(self, session)
        return page

    def send(self, method: str, session: str = "", timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._read(until)
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0, until - time.monotonic()))
            piece = os.read(self._back, 1 << 20) if ready else b""
            if not piece:
                raise PageError("Chromium does not answer" if not ready else "Chromium has ended")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keeps what pages write to the console."""
        page, parameters = self._pages.get(event.get("sessionId", "")), event.get("params", {})
        if page is None:
            return
        if event["method"] == "Runtime.consoleAPICalled":
            said = [str(part.get("value", part.get("description", ""))) for part in parameters["args"]]
            page.console.append(f"{parameters['type']}: {' '.join(said)}")
        elif event["method"] == "Log.entryAdded":
            page.console.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
        elif event["method"] == "Runtime.exceptionThrown":
            page.console.append(f"exception: {json.dumps(parameters['exceptionDetails'])[:500]}")


@contextlib.contextmanager
def launch(profile: pathlib.Path, arguments: Sequence[str] = ()) -> Iterator[Browser]:
    """Chromium without a window, with a profile of its own, until the block ends."""
    assert BROWSER
    read_commands, to = os.pipe()
    back, write_answers = os.pipe()
    command = [
        BROWSER, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
        "--no-sandbox", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio", *arguments,
    ]  # fmt: skip
    files = read_commands, write_answers
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, files), *command],
        pass_fds=files,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        browser = Browser(process, to, back)
        yield browser
        with contextlib.suppress(PageError, OSError):
            browser.send("Browser.close", timeout=5)
    finally:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to)
        os.close(back)
