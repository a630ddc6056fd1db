"""Lines, modules and directories have limits.

Lines have at most 100 columns, in every format that lets a line be wrapped. ruff holds Python to
that, and Markdown has one sentence a line. HAProxy and Debian's lists know no second line. Modules
and directories are small enough to read at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "bench", "deploy", "obdelta", "tests", "tools")
FORMATS = frozenset((".c", ".h", ".css", ".js", ".sh", ".toml", ".yaml", ".yml", ".conf", ""))
WIDTH, TAB = 100, 4
UNWRAPPED = frozenset((ROOT / "deploy/helm/ingress-nginx.yaml",))
"""A regular expression of nginx, which has no second line either."""
MAX_LINES, MAX_MODULES = 350, 15
"""Lines of a module; modules of a directory of ``obdelta``, without ``__init__.py``."""
NOT_OURS = frozenset(("node_modules", "__pycache__", "data"))


def sources() -> Iterator[Path]:
    for folder in (ROOT, *(ROOT / name for name in FOLDERS)):
        for path in folder.iterdir() if folder == ROOT else folder.rglob("*"):
            ours = not NOT_OURS.intersection(path.relative_to(ROOT).parts)
            ours = ours and not path.name.startswith((".", "_kernel_cffi"))
            if ours and path.is_file() and path.suffix in FORMATS and path not in UNWRAPPED:
                yield path


def too_long(text: str) -> list[int]:
    """Returns the numbers of lines that are too long."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if len(line.expandtabs(TAB)) > WIDTH]


def test_lines_fit_the_width() -> None:
    found = {str(path.relative_to(ROOT)): too_long(path.read_text("utf-8")) for path in sources()}
    assert len(found) > 50
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(("line", "wrong"), [("x" * 100, []), ("x" * 101, [1]), ("\t" * 26, [1])])
def test_a_line_that_is_too_long_is_found(line: str, wrong: list[int]) -> None:
    assert too_long(line) == wrong


def test_modules_are_short() -> None:
    folders = ("obdelta", "bench", "tools", "tests")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = [path for path in modules if not NOT_OURS.intersection(path.parts)]
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in modules}
    assert len(lines) > 200
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_directories_have_few_modules() -> None:
    modules = (ROOT / "obdelta").rglob("*.py")
    count = Counter(path.parent for path in modules if path.name != "__init__.py")
    assert len(count) > 20
    assert {path: found for path, found in count.items() if found > MAX_MODULES} == {}
