"""Formats sizes, shares, numbers, durations and untrusted names as plain text; markup
escapes it.
"""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def size(count: float) -> str:
    """Formats bytes with about three digits: ``512 B``, ``1.23 MB``."""
    value, power = float(count), 0
    while abs(value) >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    unit = _UNITS[power]
    if not power:
        return f"{value:.0f} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def bit_rate(bits: float) -> str:
    """Formats bits a second with two digits: ``64 kbit/s``, ``1.8 Mbit/s``."""
    kilo = bits / 1000
    return (
        f"{kilo:.0f} kbit/s" if kilo < 995 else f"{kilo / 1000:.{1 if kilo < 9950 else 0}f} Mbit/s"
    )


def share(part: float, whole: float) -> str:
    """Formats a percentage; a dash if the whole is zero."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def number(value: float) -> str:
    """Formats a whole number in groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Formats seconds as ``0.35 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    for big, small, names in (
        (_DAY, _HOUR, ("d", "h")),
        (_HOUR, _MINUTE, ("h", "min")),
        (_MINUTE, 1, ("min", "s")),
    ):
        if whole >= big:
            rest = whole % big // small
            return f"{whole // big} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def ago(seconds: float) -> str:
    """Formats the time since an event in one unit. Nothing is finer than minutes, so that a live
    page does not change all the time.
    """
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return "just now"


def visible(text: str) -> str:
    """Escapes characters of an untrusted name that are invisible or would move other text, as in
    Python.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
