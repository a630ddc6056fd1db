"""Writes the module tables of docs/architecture.md from the modules' docstrings.

``python -m tools.architecture_tables``. A test compares the page with what this would write.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
LONGEST = 160
_HEADING = re.compile(r"^#{3,4} `(obdelta/[\w/]+/)`")
_HEADER = ["| module | what it does |", "|---|---|"]


def summary(path: Path) -> str:
    """Returns the first sentence or paragraph of a module's docstring or header comment."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        found = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    else:
        comment = re.match(r"/\*+(.*?)\*/", text, re.DOTALL)
        first = re.sub(r"\n \*", "\n", comment[1] if comment else "").strip()
        found = re.split(r"(?<=\.)\s|\n\n", first, maxsplit=1)[0]
    found = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(found.split()))
    found = found.replace("``", "`").replace("|", r"\|")
    return found if len(found) <= LONGEST else found[: found.rfind(" ", 0, LONGEST - 2)] + " …"


def modules(folder: Path) -> list[Path]:
    """Returns the sources of a folder, without package files and without generated ones."""
    sources = (path for path in folder.iterdir() if path.suffix in (".py", ".c", ".h"))
    return sorted(
        path
        for path in sources
        if path.name != "__init__.py" and not path.name.startswith("_kernel_cffi")
    )


def table(folder: Path) -> list[str]:
    """Returns the lines of a folder's table."""
    return [*_HEADER, *(f"| `{path.name}` | {summary(path)} |" for path in modules(folder))]


def rewritten(page: str) -> str:
    """Returns the page with every table of modules rewritten."""
    lines: list[str] = []
    folder: Path | None = None
    in_table = False
    for line in page.splitlines():
        if match := _HEADING.match(line):
            folder = ROOT / match[1]
        if line == _HEADER[0] and folder is not None:
            lines += table(folder)
            folder, in_table = None, True
        elif not (in_table and line.startswith("|")):
            in_table = False
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")
