"""Text that commands print, held against what stands in a test."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.:/@-])\d+(,\d{3})*(\.\d+)?%?(?![\w-]|:\w)")


def normal(text: str) -> str:
    """For text whose sizes and times are not the test's matter: numbers that stand alone are ``N``,
    runs of blanks one.
    """
    return "\n".join(" ".join(line.split()) for line in _NUMBER.sub("N", text).splitlines())
