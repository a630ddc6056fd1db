"""Tables for terminals, and untrusted text made safe to print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns lines with a heading. A column whose heading begins with ``>`` is right-aligned.
    Lines have no trailing blanks.
    """
    names = [name.removeprefix(">") for name in head]
    lines = [names, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name.startswith(">") else cell.ljust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    )


def fields(rows: Iterable[tuple[str, str]]) -> str:
    """Returns names and values, one a line."""
    found = list(rows)
    width = max((len(name) for name, _ in found), default=0)
    return "\n".join(f"{name.ljust(width)}  {printable(value)}".rstrip() for name, value in found)


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


def ago(seconds: float) -> str:
    """Formats a duration in its largest unit: ``12 s``, ``3 min``, ``5 h``, ``8 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
