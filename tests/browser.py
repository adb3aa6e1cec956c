"""A headless Chromium driven through chromedriver's own protocol (W3C WebDriver over HTTP); no package is needed.

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

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element
ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine itself
PATIENCE = 60.0  # seconds until something that should appear is given up


def chromium() -> tuple[str, str] | None:
    """Paths of Chromium and chromedriver, or None where one of them is missing."""
    browser = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window of a fresh headless Chromium. Use it as a context manager.

    `scale`: device pixels per CSS pixel. Lookups are by CSS selector; waiting ends with an AssertionError that shows
    what the page says.
    """

    def __init__(self, *, width: int = 1200, height: int = 1000, scale: float = 1.0) -> None:
        found = chromium()
        if found is None:
            raise RuntimeError("no chromium and chromedriver on the PATH; apt-get install chromium chromium-driver")
        browser, driver = found
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        # The driver has a process group of its own, so that it takes Chromium along when it ends.
        self._driver = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        self._session = ""
        try:
            self._root = f"http://127.0.0.1:{self._driver_port()}"
            options = {
                "binary": browser,
                "args": [
                    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                    *("--no-first-run", "--hide-scrollbars", f"--user-data-dir={self._profile}"),
                    *(f"--window-size={width},{height}", f"--force-device-scale-factor={scale}"),
                ],
            }
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
            }
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{session['sessionId']}"
        except BaseException:
            self.close()
            raise

    def _driver_port(self) -> int:
        for line in self._driver.stdout:
            if match := re.search(r"started successfully on port (\d+)", line):
                return int(match[1])
        raise RuntimeError("chromedriver ended before it listened")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._root + path, data, {"Content-Type": "application/json"} if data else {}, method=method
        )
        try:
            with LOCAL.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            told = json.load(error)["value"]
            raise LookupError(f"{told['error']}: {told['message'].splitlines()[0]}") from None

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def script(self, code: str, *arguments: Any) -> Any:
        """What JavaScript `code` returns; it finds `arguments` in `arguments`."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": code, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        """The first element that matches. Raises LookupError when there is none."""
        return self._call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})

    def count(self, selector: str) -> int:
        return self.script("return document.querySelectorAll(arguments[0]).length", selector)

    def text(self, selector: str) -> str:
        """The visible text of the first match."""
        return self._call("GET", f"{self._session}/element/{self.find(selector)[ELEMENT]}/text")

    def texts(self, selector: str) -> list[str]:
        """The text content of all matches, visible or not."""
        return self.script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def click(self, selector: str) -> None:
        """A real click of the pointer, which fails where something covers the element."""
        element = self.find(selector)
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        self._call("POST", f"{self._session}/element/{element[ELEMENT]}/click")

    def hover(self, selector: str) -> None:
        """Move the pointer onto the first match."""
        element = self.find(selector)
        self.script("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "duration": 0, "origin": element, "x": 0, "y": 0}
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._call("POST", f"{self._session}/actions", {"actions": [pointer]})

    def type(self, selector: str, text: str, *, clear: bool = True) -> None:
        """Type into the first match as a user does, in place of what is there."""
        element = self.find(selector)[ELEMENT]
        if clear:
            self._call("POST", f"{self._session}/element/{element}/clear")
        self._call("POST", f"{self._session}/element/{element}/value", {"text": text})

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition()` is true (a missing element is not) and return it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(LookupError):
                if value := condition():
                    return value
            time.sleep(0.1)
        raise AssertionError(
            f"waited in vain for {what}; the page says:\n{self.script('return document.body.innerText')}"
        )

    def requested(self) -> list[str]:
        """URLs that were asked for over the network since the last call."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors in the browser's console since the last call."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def resize(self, width: int, height: int) -> None:
        self._call("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def close(self) -> None:
        """End Chromium and its driver."""
        if self._session:
            with contextlib.suppress(LookupError, OSError):
                self._call("DELETE", self._session)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGTERM)
        self._driver.wait(timeout=30)
        self._driver.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def served(*flags: object, **environment: str) -> Iterator[str]:
    """The page's address, while `python -m demo.app` serves it on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.app", "--port", "0", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = next((line.split()[-1] for line in process.stdout if "http://" in line), None)
        if url is None:
            raise AssertionError(f"exit {process.wait()}: {process.stderr.read()}")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
        process.stderr.close()
