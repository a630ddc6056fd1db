"""Headless Chromium, driven by selenium: Debian's browser and driver, a fresh profile, nothing
fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHECK_TIMEOUT = 60

MEASURE = """
const shown = [...document.querySelectorAll("main :not(thead *, svg *)")];
return [
    document.documentElement.scrollWidth,
    getComputedStyle(document.body).backgroundColor,
    Math.max(...shown.map((one) => one.getBoundingClientRect().right)),
];
"""


@contextmanager
def browser(
    profile: Path, *, width: int = 1200, height: int = 900, dark: bool = False, scripts: bool = True
) -> Iterator[Chrome]:
    """Yields a browser that ends with the block. ``profile``: a directory that does not exist yet.
    Console messages are kept.
    """
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not scripts:
        options.add_experimental_option(
            "prefs", {"profile.managed_default_content_settings.javascript": 2}
        )
    driver = Chrome(options, ChromeService("/usr/bin/chromedriver"))
    try:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def text_of(page: Chrome, section: str) -> str:
    # In one step, because sections are replaced meanwhile.
    return str(
        page.execute_script("return document.getElementById(arguments[0]).innerText", section)
    )


def wait_for(page: Chrome, condition: Callable[[Chrome], bool]) -> None:
    WebDriverWait(page, CHECK_TIMEOUT).until(condition)


def faults(page: Chrome) -> list[str]:
    """Returns the browser's console: a refused style, script or request would be there."""
    return [str(entry["message"]) for entry in page.get_log("browser")]  # type: ignore[no-untyped-call] # selenium's
