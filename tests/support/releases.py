"""Layers of two releases of a program, made from a seed."""

from __future__ import annotations

import random

from tests.support import layer_edits
from tests.support.delta import File, tar_of

WORDS = [*layer_edits.WORDS, b"base "]


def program(rng: random.Random, size: int) -> bytes:
    """Returns bytes that repeat as a text does."""
    return b"".join(rng.choices(WORDS, k=size // 6))[:size]


def edited(rng: random.Random, content: bytes, edits: int) -> bytes:
    """Returns the bytes with some replaced, inserted or removed at several places."""
    changed = bytearray(content)
    for _ in range(edits):
        at = rng.randrange(len(changed))
        changed[at : at + rng.choice([0, 1, 4, 40])] = rng.randbytes(rng.choice([0, 1, 4, 30]))
    return bytes(changed)


def releases(seed: int = 1, files: int = 40) -> tuple[list[bytes], bytes]:
    """Returns a base of two layers and a target layer: unchanged, edited, moved, new and deleted
    files, all with other times.
    """
    rng = random.Random(seed)
    old = [
        File(f"usr/lib/p{i}/file-{i}.py", program(rng, rng.randrange(60_000)), 1_000)
        for i in range(files)
    ]
    old += [File(f"usr/lib/b{i}", rng.randbytes(rng.randrange(200_000)), 1_000) for i in range(6)]
    new = [
        File(f.name, edited(rng, f.content, 12) if i % 3 else f.content, 2_000)
        for i, f in enumerate(old)
        if f.content
    ]
    new[3] = new[3]._replace(name="usr/lib/moved.py")
    new.insert(10, File("usr/lib/new.py", program(rng, 30_000), 2_000))
    new.insert(20, File("usr/lib/noise", rng.randbytes(9_000), 2_000))
    del new[15]
    return [tar_of(old[: files // 2]), tar_of(old[files // 2 :])], tar_of(new)
