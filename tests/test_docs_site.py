"""The documentation's site: it builds, its links lead somewhere, and browsers can use it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from selenium.webdriver.common.by import By

from obdelta import settings
from tests.support.axe import violations
from tests.support.browser import browser
from tests.support.pages import ROOT
from tests.support.processes import until

DOCS = ROOT / "docs"


class Page(HTMLParser):
    """The anchors of a page, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src"):
                self.links.add(value)
            elif name == "srcset":
                self.links.update(part.split()[0] for part in value.split(","))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site as `make docs` does; a page in no table of contents, and a broken link, are
    errors.
    """
    out = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-d",
            out / "doctrees",
            DOCS,
            out / "html",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return out / "html"


def test_every_page_is_built(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists()


def test_every_link_and_anchor_in_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 20
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "http", "mailto", "data"), f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name} links to {link}"
            checked += 1
    assert checked > 500


def test_every_link_of_the_other_pages_leads_somewhere(site: Path) -> None:
    """Links of README files to files in the checkout, and to headings of the documentation."""
    checked = 0
    for page in [ROOT / "README.md", ROOT / "tests/README.md", *ROOT.glob("deploy/**/*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.parent / parts.path).resolve()
            assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
            if parts.fragment:
                assert target.parent == DOCS, link
                assert (
                    parts.fragment in Page((site / f"{target.stem}.html").read_text("utf-8")).ids
                ), link
            checked += 1
    assert checked > 20


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """Returns the site's address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.timeout(900)
def test_each_page_of_the_site_is_accessible(served: str, site: Path, tmp_path: Path) -> None:
    found = {}
    with browser(tmp_path / "profile") as driver:
        for page in sorted(site.glob("*.html")):
            driver.get(f"{served}/{page.name}")
            if problems := violations(driver, contrast=False):
                found[page.name] = problems
    assert found == {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_site_has_contrast(served: str, tmp_path: Path, dark: bool) -> None:
    """Checks pages with text, tables, and code in several languages: all pages have the same
    styles.
    """
    with browser(tmp_path / "profile", dark=dark) as driver:
        for page in ("index", "operations", "metrics", "search"):
            driver.get(f"{served}/{page}.html")
            assert violations(driver) == [], page


def test_search_finds_statuses_ports_and_words(served: str, tmp_path: Path) -> None:
    """The most helpful page comes first; a setting is found with its section."""
    expected = {
        "401": "li:first-child a[href^='trouble.html']",
        "504": "li:first-child a[href^='trouble.html']",
        "9100": "li:first-child a[href^='operators.html']",
        "uninstall": "li:first-child a[href^='operations.html']",
        "max-builds": "a[href='settings.html#max-builds']",
    }
    with browser(tmp_path / "profile") as driver:
        for query, link in expected.items():
            driver.get(f"{served}/search.html?q={query}")
            until(
                f"{query} is found by {link}",
                lambda link=link: driver.find_elements(  # type: ignore[misc]
                    By.CSS_SELECTOR, f"#search-results {link}"
                ),
            )


def test_code_is_coloured_and_can_be_copied(served: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as driver:
        driver.get(f"{served}/operations.html")
        blocks = driver.find_elements(By.CSS_SELECTOR, "div.highlight")
        assert blocks
        assert all(block.find_elements(By.CSS_SELECTOR, "button.copybtn") for block in blocks)
        assert driver.find_elements(By.CSS_SELECTOR, "div.highlight pre span[class]")


def test_each_setting_has_a_section_whose_text_is_whole(served: str, tmp_path: Path) -> None:
    """At a phone's width too, where a table would be cut off."""
    with browser(tmp_path / "profile", width=400) as driver:
        driver.get(f"{served}/settings.html")
        for row in settings.table():
            section = driver.find_element(By.ID, row.key)
            assert row.environment[0] in section.text
            assert driver.execute_script(
                "return arguments[0].scrollWidth <= document.documentElement.clientWidth", section
            ), row.key
