"""Take a picture of the demo's page: serve it, continue its prompt, open a token, save a PNG.

    python tests/demo_screenshot.py --output docs/demo.png [flags of demo.app]

Needs Chromium, chromedriver and gradio. Without flags it shows the quickstart's memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from browser import Browser, served

WIDTH = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"), help="the PNG")
    parser.add_argument("--token", help="token to open (default: the one that the memory raised most)")
    parser.add_argument("--scale", type=float, default=1.5, help="pixels of the picture for a pixel of the page")
    arguments, flags = parser.parse_known_args()
    with served(*flags) as url, Browser(width=WIDTH, height=1400, scale=arguments.scale) as browser:
        browser.open(url)
        browser.wait(lambda: browser.find("#go"), "button")
        browser.click("#go")
        browser.wait(lambda: browser.count(".mlpm-token"), "tokens")
        if arguments.token:
            browser.script(
                "[...document.querySelectorAll('[data-side=joint] .mlpm-token')]"
                ".find(token => token.textContent.trim() === arguments[0]).click()",
                arguments.token,
            )
        browser.script("document.activeElement?.blur(); window.scrollTo(0, 0)")
        # The window's frame is part of its size, the page is not.
        frame = browser.script("return window.outerHeight - window.innerHeight")
        end = browser.script("return document.querySelector('#inspector').getBoundingClientRect().bottom")
        browser.resize(WIDTH, int(end) + 24 + frame)
        time.sleep(0.5)  # the new size is drawn
        browser.screenshot(arguments.output)


if __name__ == "__main__":
    main()
