"""File names of images, which may be any bytes, as printable text."""

from __future__ import annotations

MAX_PRINTED_NAME = 200
"""Maximum number of characters of a printed name."""


def printable_name(name: bytes) -> str:
    r"""Returns a file's name as text of at most 200 characters. Bytes that are not UTF-8 or cannot
    be printed are escaped (``\xff``). A longer name loses its middle.
    """
    text = "".join(
        char if char.isprintable() and char != "\\" else _escaped(char)
        for char in name.decode("utf-8", "surrogateescape")
    )
    half = (MAX_PRINTED_NAME - 1) // 2
    return text if len(text) <= MAX_PRINTED_NAME else f"{text[:half]}…{text[-half:]}"


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # surrogateescape's form of a byte that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
