"""Compares the output of commands with the text in a test."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.:/@-])\d+(,\d{3})*(\.\d+)?%?(?![\w-]|:\w)")


def normal(text: str) -> str:
    """Normalises text whose sizes and times do not matter: separate numbers become ``N``, runs of
    blanks one blank.
    """
    return "\n".join(" ".join(line.split()) for line in _NUMBER.sub("N", text).splitlines())
