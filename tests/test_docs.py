"""The documentation: files, tests and commands that it names exist, and pages keep the rules that
no linter knows.
"""

from __future__ import annotations

import collections
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from obdelta import settings
from tests.support.commands import run
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
