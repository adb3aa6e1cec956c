"""A headless Chromium driven over chromedriver's HTTP protocol (W3C WebDriver), and the demo's page to look at with it.

Needs the programs `chromium` and `chromedriver` (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element
ROOT = Path(__file__).resolve().parent.parent
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TIMEOUT = 60.0  # seconds to wait for an answer or for something to appear


def available() -> bool:
    """Whether Chromium and chromedriver are installed."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One window of a fresh headless Chromium, as a context manager. Elements are looked up by CSS selector.

    `scale`: device pixels per CSS pixel.
    """

    def __init__(self, *, width: int = 1200, height: int = 1400, scale: float = 1.0) -> None:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        # In a process group of its own, with Chromium, so that both can be ended together.
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], start_new_session=True, **pipes)
        started = (re.search(r"started successfully on port (\d+)", line) for line in self._driver.stdout)
        self._url = f"http://127.0.0.1:{next(filter(None, started))[1]}"
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={self._profile}"),
                *(f"--window-size={width},{height}", f"--force-device-scale-factor={scale}"),
            ],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{session['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST `body` to the session, or GET without one."""
        url = f"{self._url}/{path}" if "/session" in self._url else f"{self._url}/session"
        data = None if body is None else json.dumps(body).encode()
        try:
            with LOCAL.open(urllib.request.Request(url, data), timeout=TIMEOUT) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise LookupError(json.load(error)["value"]["message"].splitlines()[0]) from None

    def open(self, url: str) -> None:
        self._call("url", {"url": url})

    def script(self, code: str, *arguments: Any) -> Any:
        """What JavaScript `code` returns; it sees `arguments`."""
        return self._call("execute/sync", {"script": code, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        """The first element that matches, scrolled into view. Raises LookupError when there is none."""
        element = self._call("element", {"using": "css selector", "value": selector})
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def count(self, selector: str) -> int:
        return self.script("return document.querySelectorAll(arguments[0]).length", selector)

    def texts(self, selector: str) -> list[str]:
        """The text content of all matches, visible or not; the value of a text field."""
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.value || e.textContent)", selector
        )

    def click(self, selector: str) -> None:
        """A click of the pointer; fails where something covers the element."""
        self._call(f"element/{self.find(selector)[ELEMENT]}/click", {})

    def hover(self, selector: str) -> None:
        """Move the pointer onto the first match."""
        move = {"type": "pointerMove", "duration": 0, "origin": self.find(selector), "x": 0, "y": 0}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._call("actions", {"actions": [pointer]})

    def type(self, selector: str, text: str) -> None:
        """Type into the first match, in place of its content."""
        element = self.find(selector)[ELEMENT]
        self._call(f"element/{element}/clear", {})
        self._call(f"element/{element}/value", {"text": text})

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition()` is true (a missing element is not) and return it."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            with contextlib.suppress(LookupError):
                if value := condition():
                    return value
            time.sleep(0.1)
        raise AssertionError(f"no {what}; the page shows:\n{self.script('return document.body.innerText')}")

    def errors(self) -> list[str]:
        """Errors in the browser's console since the last call."""
        entries = self._call("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self._call("screenshot")))

    def resize(self, width: int, height: int) -> None:
        self._call("window/rect", {"width": width, "height": height})

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._driver.pid, signal.SIGTERM)
        self._driver.wait(timeout=30)
        self._driver.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)


@contextlib.contextmanager
def served(*flags: object) -> Iterator[str]:
    """The page's address, while `python -m demo.app` serves it on a free port."""
    command = [sys.executable, "-m", "demo.app", "--port", "0", *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(line.split()[-1] for line in process.stdout if "http://" in line)
        finally:
            process.terminate()
