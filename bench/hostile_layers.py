"""Layers that take a delta builder long: base and target tars, by name, of about a given size."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable

Pair = tuple[bytes, bytes]


def _tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def digit_names(size: int) -> Pair:
    """Small files whose names differ in digits only: frames, tiles."""
    rng = random.Random(2)
    count = size // 1024
    sides = [
        [(f"tiles/{side}{number:08}.png", rng.randbytes(40)) for number in range(count)]
        for side in (1, 2)
    ]
    return _tar(sides[0]), _tar(sides[1])


def long_names(size: int) -> Pair:
    """Deep paths that begin alike."""
    count = size // 2048
    return tuple(
        _tar((f"{'a/' * 120}{side}{number}", b"x") for number in range(count)) for side in "pq"
    )  # type: ignore[return-value]


def growing_repeats(size: int) -> Pair:
    """Each repetition of a block is equal for one byte more than the one before."""
    rng = random.Random(3)
    block = rng.randbytes(2048)
    parts = [
        block[: 1024 + number % 1024] + rng.randbytes(1024 - number % 1024)
        for number in range(size // 2048)
    ]
    return b"".join(parts), block * (size // 2048)


def _periodic(period: bytes) -> Callable[[int], Pair]:
    def made(size: int) -> Pair:
        rng = random.Random(4)
        long = period * (600 // len(period) + 2)
        target = b"".join(
            long[: rng.randrange(1, 600)] + rng.randbytes(1) for _ in range(size // 300)
        )
        return period * (size // len(period)), target

    return made


def shared_keys(size: int) -> Pair:
    """Every second word is the same: each look-up has candidates, and none of them is a longer
    match.
    """
    rng = random.Random(5)
    word = rng.randbytes(8)
    sides = [b"".join(word + rng.randbytes(8) for _ in range(size // 16)) for _ in range(2)]
    return sides[0], sides[1]


def shared_blocks(size: int) -> Pair:
    """One block over and over, and blocks that differ from it in their last byte."""
    rng = random.Random(6)
    block = rng.randbytes(512)
    base = b"".join(block + rng.randbytes(512) for _ in range(size // 1024))
    return base, b"".join(block[:511] + rng.randbytes(1) + block for _ in range(size // 1024))


def few_words(size: int) -> Pair:
    """Text of seven words in any order: many candidates that match for a while."""
    rng = random.Random(7)
    words = [b"static ", b"const ", b"int ", b"foo", b"bar ", b"(x)", b"\n"]
    sides = [b"".join(rng.choices(words, k=size // 4)) for _ in range(2)]
    return sides[0], sides[1]


PATTERNS: dict[str, Callable[[int], Pair]] = {
    "digit names": digit_names,
    "long names": long_names,
    "growing repeats": growing_repeats,
    "one byte": _periodic(b"\0"),
    "period of two": _periodic(b"ab"),
    "period of nine": _periodic(b"obdelta 9"),
    "period of 600": _periodic(random.Random(8).randbytes(600)),
    "shared keys": shared_keys,
    "shared blocks": shared_blocks,
    "few words": few_words,
}
