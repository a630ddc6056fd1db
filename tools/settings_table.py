"""usage: python -m tools.settings_table [--check]

Writes the table of docs/settings.md anew from obdelta.settings. With --check nothing is
written, and the exit status is 1 when the page is out of date.
"""

import sys
from pathlib import Path

from obdelta.settings import table

PAGE = Path(__file__).parent.parent / "docs/settings.md"
HEAD = "| key | environment | default | meaning |\n|---|---|---|---|\n"


def rows() -> str:
    """The table's body."""
    lines = []
    for row in table():
        names = ", ".join(f"`{name}`" for name in row.environment)
        default = row.derive_shown or row.default_shown
        lines.append(f"| `{row.key}` | {names} | {default} | {row.meaning} |\n")
    return "".join(lines)


def main() -> int:
    old = PAGE.read_text("utf-8")
    before, head, rest = old.partition(HEAD)
    body, gap, after = rest.partition("\n\n")
    if not (head and gap and all(line.startswith("|") for line in body.splitlines())):
        sys.stderr.write("docs/settings.md has no table to replace\n")
        return 1
    new = before + head + rows() + "\n" + after
    if "--check" in sys.argv[1:]:
        if new != old:
            sys.stderr.write("docs/settings.md is out of date: run .venv/bin/python -m tools.settings_table\n")
        return int(new != old)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
