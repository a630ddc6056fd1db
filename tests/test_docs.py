"""The documentation: the site builds, links and commands in it exist, and pages keep the rules that
no linter knows.
"""

from __future__ import annotations

import collections
import itertools
import re
import shlex
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
from tests.support.commands import run
from tests.support.processes import until
from tools.pictures import drawings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OTHERS = {
    "OBDELTA_IMAGE",
    "OBDELTA_ADDRESS",
    "OBDELTA_CONFIG",
    "OBDELTA_PORT",
    "OBDELTA_SERVICE_HOST",
}
"""Variables that are no settings: those of the compose overlay and of haproxy's, the one that
names the settings file, and some that Kubernetes sets.
"""


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


def test_the_pictures_are_up_to_date() -> None:
    for path, content in drawings():
        assert path.read_text("utf-8") == content, (
            f"python -m tools.pictures writes another {path.name}"
        )


def test_modules_named_on_the_architecture_page_exist() -> None:
    """Checks the paths in its prose; its tables are checked with the imports."""
    page = (DOCS / "architecture.md").read_text("utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|c|md|yaml))`", page))
    for path in named:
        assert any((root / path).exists() for root in (ROOT, ROOT / "obdelta")), path
    assert len(named) > 10


def test_each_measure_of_the_security_page_has_its_promise() -> None:
    """And so a test, as the one below checks."""
    page = (DOCS / "security.md").read_text("utf-8")
    measures, _ = page.split("## Measures", 1)[1].split("\n## ", 1)
    named = re.findall(r"^- \*\*(.+?)\*\*", measures, re.MULTILINE)
    assert len(named) > 12
    rows = re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE)
    assert [name.rstrip(".") for name in rows] == [name.rstrip(".") for name in named]


def test_tests_named_on_pages_exist() -> None:
    """Every promise of the security page names a test by its path."""
    named = {
        path
        for page in DOCS.glob("*.md")
        for path in re.findall(r"`((?:tests|bench|tools)/[^`\s]+\.py)`", page.read_text("utf-8"))
    }
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
    assert len(named) > 30
    _, table = (DOCS / "security.md").read_text("utf-8").split("| promise | shown by |\n")
    promises = [line for line in table.split("\n\n")[0].splitlines() if not line.startswith("|--")]
    assert len(promises) > 10
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for promise in promises:
        shown_by = re.findall(r"`([^`]+)`", promise.split("|")[2])
        tests = [path for path in shown_by if path.startswith("tests/")]
        assert tests, f"no test shows: {promise}"
        assert all("def test_" in (ROOT / path).read_text("utf-8") for path in tests), promise
        commands_shown = {name.removeprefix("make ") for name in set(shown_by) - set(tests)}
        assert commands_shown <= targets, promise


def guides() -> Iterator[tuple[str, str]]:
    for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        yield path.name, path.read_text("utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """Yields command lines in blocks of code, as words of a shell; a backslash at the end joins
    lines.
    """
    blocks = re.findall(
        r"^```(?:sh|bash|shell|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    indented = "\n".join(line[4:] if line.startswith("    ") else "" for line in text.splitlines())
    for block in [*blocks, indented]:
        for line in block.replace("\\\n", " ").splitlines():
            try:
                yield shlex.split(line.lstrip("$ "), comments=True)
            except ValueError:
                continue  # not for a shell: for example a log line with an apostrophe


NOT_YET = frozenset((ROOT / "tools/prose/not-yet.txt").read_text().splitlines())
"""Pages that are not in plain English yet; `make check` leaves them out, too."""


def plain_pages() -> Iterator[tuple[str, str]]:
    for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("deploy/**/*.md")]:
        name = str(path.relative_to(ROOT))
        if name not in NOT_YET and name != "CHANGELOG.md":
            yield name, path.read_text("utf-8")


def prose_lines(text: str) -> Iterator[tuple[str, str]]:
    """Returns each line of a paragraph or list item, without its code, and the line after it."""
    text = re.sub(
        r"^(```.*?^```|<!--.*?-->|<picture>.*?</picture>)$",
        "",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    lines = [re.sub(r"`[^`]*`", "code", line) for line in [*text.splitlines(), ""]]
    for line, following in itertools.pairwise(lines):
        # Four spaces begin a code block, or continue a list item that is not read here.
        if line.strip() and not line.startswith(("#", "|", "    ", "\t")):
            yield line, following.strip()


def test_the_list_of_pages_to_rewrite_names_pages() -> None:
    for name in NOT_YET:
        assert name.startswith("#") or (ROOT / name).is_file(), name


def test_a_sentence_is_one_line() -> None:
    begins_a_block = re.compile(r"[-|#>]|\d+\. |$")
    checked = 0
    for name, text in plain_pages():
        for line, following in prose_lines(text):
            sentences = re.split(
                r"(?<=[.?!])[*_)]* +(?=[A-Z])", re.sub(r"\b(?:e\.g|i\.e|etc)\.", "", line.strip())
            )
            # A list item's number is no sentence, and a short label may come before the first
            # one.
            longer = [
                part
                for part in sentences
                if not re.fullmatch(r"\d+\.|(?:[-*] |\d+\. )?\*\*[^*]*(?:\*\*)?", part)
            ]
            assert len(longer) <= 1, f"{name}: several sentences in one line: {line}"
            if not begins_a_block.match(following):
                assert re.search(r"[.:?!;,][*_)]*$", line), (
                    f"{name}: a sentence goes on in the next line: {line}"
                )
            checked += 1
    assert checked > 20


def test_table_cells_are_short() -> None:
    for name, text in plain_pages():
        for line in text.splitlines():
            if line.startswith("|"):
                for cell in re.split(r"(?<!\\)\|", line):
                    assert len(cell.strip()) <= 200, f"{name}: {cell}"


def test_no_module_name_occurs_more_than_three_times() -> None:
    counted = collections.Counter(path.name for path in (ROOT / "obdelta").rglob("*.py"))
    for name in ("__init__.py", "__main__.py"):
        counted.pop(name, None)
    assert len(counted) > 100
    assert [name for name, times in counted.items() if times > 3] == []


def test_commands_of_ours_have_the_options_that_are_shown() -> None:
    helps: dict[str, str] = {}
    seen = 0
    for name, text in guides():
        for words in commands(text):
            for at, word in enumerate(words):
                if (
                    Path(word).name != "obdelta"
                    or at + 1 >= len(words)
                    or at > 1
                    or words[0] in ("twistd", "docker", "cd")
                ):
                    continue
                verb = words[at + 1]
                if not re.fullmatch(r"[a-z]+", verb) or "-m" in words[:at]:
                    continue
                if verb not in helps:
                    helps[verb] = run(verb, "--help").stdout.decode()
                    if "--help-settings" in helps[verb]:
                        helps[verb] += run(verb, "--help-settings").stdout.decode()
                for option in (
                    each.partition("=")[0]
                    for each in words[at + 2 :]
                    if re.match(r"--?[a-z]", each)
                ):
                    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", helps[verb]), (
                        f"{name}: {' '.join(words)}"
                    )
                seen += 1
    assert seen > 5


def test_server_options_and_variables_that_are_shown_exist() -> None:
    keys = {row.key for row in settings.table()} | {"config", "version", "help"}
    variables = {name for row in settings.table() for name in row.environment} | OTHERS
    for name, text in guides():
        for words in commands(text):
            if "obdelta" in words and any(Path(word).name == "twistd" for word in words):
                for word in words[words.index("obdelta") + 1 :]:
                    if word.startswith("--"):
                        assert word[2:].partition("=")[0] in keys, f"{name}: {word}"
        for variable in re.findall(r"OBDELTA_[A-Z0-9_]*[A-Z0-9]", text):
            assert variable in variables, f"{name}: {variable}"
