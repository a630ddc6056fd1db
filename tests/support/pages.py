"""The commands of a documentation page, and the output that the page promises."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """An indented block of a page. ``promised`` is the output behind a command with ``$``."""

    section: str
    commands: str
    promised: str


def blocks(page: str) -> list[Block]:
    """Returns the blocks of ``docs/PAGE``, or of the README."""
    text = (ROOT / page).read_text("utf-8")
    found = []
    section = ""
    for part in re.split(r"\n{2,}(?=\S)|(?<=\n)\n(?=    )", text):
        if heading := re.match(r"#+ (.+)", part):
            section = heading[1]
        if part.startswith("    "):
            commands, promised = _split(textwrap.dedent(part))
            found.append(Block(section, commands, promised))
    return found


def _split(block: str) -> tuple[str, str]:
    """Returns commands after ``$``, with their continued lines, and the output below them. A block
    without ``$`` is commands only.
    """
    if not block.startswith("$ "):
        return block, ""
    commands, promised = [], []
    continued = False
    for line in block.splitlines():
        if line.startswith("$ ") or continued:
            commands.append(line.removeprefix("$ "))
            continued = line.endswith("\\")
        else:
            promised.append(line)
    return "\n".join(commands), "\n".join(promised)


def shape(text: str) -> list[str]:
    """Returns the lines of an output, with changing hashes, numbers and units replaced."""
    return list(_shapes(text))


def _shapes(text: str) -> Iterator[str]:
    for line in text.strip().splitlines():
        line = re.sub(r"[0-9a-f]{12,}", "HASH", line)
        line = re.sub(r"[0-9][0-9,.]*( [kMG]?B\b)?", "N", line)
        yield " ".join(line.split())
