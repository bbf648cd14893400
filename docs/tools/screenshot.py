"""The picture of a report in the README and in ``docs/report.md``; needs playwright and Chromium.

python -m docs.tools.screenshot RUN_DIR
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

FILE = Path(__file__).resolve().parent.parent / "pictures" / "report.png"


def main() -> None:
    """Open the page of a run and take the top of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished search")
    report = (parser.parse_args().run / "report.html").resolve()
    browser = os.environ.get("DQSS_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser)
        page = started.new_page(viewport={"width": 1560, "height": 1190}, color_scheme="light")
        page.goto(report.as_uri())
        page.wait_for_selector("#chart-evolution .main-svg")
        # A row whose choice took its time says more than the first.
        page.click("#table tbody tr:nth-child(26)")
        page.evaluate("() => window.scrollTo(0, 0)")
        page.screenshot(path=FILE)
        started.close()


if __name__ == "__main__":
    main()
