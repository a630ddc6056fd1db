"""Tables for terminals, and untrusted text made safe to print."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# rich is imported where it draws: every command imports this module.

_UNBOUNDED = 1 << 16
"""Columns of output that is never wrapped, so that other programs can read it by lines."""
_STYLES: Mapping[str, str] = {
    "ready": "green",
    "kept": "green",
    "pinned": "green",
    "building": "yellow",
    "running": "yellow",
    "queued": "yellow",
    "failed": "red",
    "403": "red",
    "401": "red",
    "404": "red",
}
"""Colours of states, on terminals."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns lines with a heading. A column whose heading begins with ``>`` is right-aligned.
    Lines have no trailing blanks. On a terminal the heading is bold.
    """
    from rich.table import Table

    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in head:
        drawn.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
        )
    return _rendered(drawn, rows)


def fields(rows: Iterable[tuple[str, str]]) -> str:
    """Returns names and values, one a line."""
    from rich.table import Table

    return _rendered(Table.grid(padding=(0, 2, 0, 0), pad_edge=False), rows)


def _rendered(drawn: Table, rows: Iterable[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        drawn.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    out, terminal = io.StringIO(), sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _UNBOUNDED
    Console(file=out, width=width, force_terminal=terminal, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def printable(text: str) -> str:
    """Replaces control characters, which a terminal would obey, with question marks."""
    return "".join(char if char.isprintable() else "?" for char in text)


def size(count: int) -> str:
    """Formats bytes with about three digits: ``999``, ``12.3 kB``, ``4.56 GB`` (powers of 1000)."""
    value, unit = float(count), ""
    for unit in ("", " kB", " MB", " GB", " TB"):
        if value < 999.5 or unit == " TB":
            break
        value /= 1000
    if not unit:
        return str(count)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"


def counted(count: int, thing: str) -> str:
    """Formats a number of things: ``1 delta``, ``2 deltas``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def short_image(repository: str, digest: str, named: str = "") -> str:
    """Formats an image as repository, short digest and names:
    ``acme/web@0123456789ab acme/web 1.4.2``.
    """
    return f"{repository or '?'}@{digest.removeprefix('sha256:')[:12]} {named}".rstrip()


def ago(seconds: float) -> str:
    """Formats a duration in its largest unit: ``12 s``, ``3 min``, ``5 h``, ``8 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
