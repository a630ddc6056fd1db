"""``python -m tools.screenshot URL``: takes the README's picture of the status page.

URL is the page of a running server, such as that of ``KEEP=1 make demo``. Run as root, or as a user
whose Chromium has a sandbox.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.support.browser import browser

PICTURE = Path(__file__).parent.parent / "docs/_static/status-page.png"
WIDTH, HEIGHT = 1100, 1220


def take(url: str, picture: Path) -> None:
    """Writes the upper part of a page as PNG, as a browser with a light theme displays it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        browser(Path(folder, "profile"), width=WIDTH, height=HEIGHT) as driver,
    ):
        driver.get(url)
        driver.execute_script("document.documentElement.style.overflow = 'hidden'")
        if not driver.save_screenshot(str(picture)):
            raise SystemExit(f"{picture} cannot be written")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    take(sys.argv[1], PICTURE)
