"""Image layers and their next release, by a seed: every kind of edit that a
build does to a layer.
"""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

MTIME = 1_700_000_000
FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
WORDS = [
    b"static ",
    b"const ",
    b"return ",
    b"struct ",
    b"uint64_t ",
    b"while ",
    b"offset ",
    b"index ",
    b"layer ",
]


class Entry(NamedTuple):
    """A regular file, or a directory where ``content`` is None."""

    name: str
    content: bytes | None
    mtime: float = MTIME


Layer = list[Entry]
Edit = Callable[[random.Random, Layer], Layer]


class Release(NamedTuple):
    """Tars of the base's layers and of the target's; ``edits`` lists the changes."""

    base: list[bytes]
    target: list[bytes]
    edits: str


def tar_of(layer: Layer, form: int) -> bytes:
    """The layer's tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content, mtime in layer:
            info = tarfile.TarInfo(name)
            info.mtime = mtime if form == tarfile.PAX_FORMAT else int(mtime)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def some_bytes(rng: random.Random, size: int) -> bytes:
    """Returns content of a random kind: noise, text, a run of one byte, a short period, records."""
    kind = rng.randrange(8)
    if kind < 4:
        return rng.randbytes(size)
    if kind < 6:
        return b"".join(rng.choices(WORDS, k=size // 5 + 1))[:size]
    if kind == 6:
        period = rng.randbytes(rng.choice([1, 1, 3, 8, 100]))
        return (period * (size // len(period) + 1))[:size]
    records = [
        rng.randrange(1 << 20).to_bytes(4, "little") + b"\x08\0\0\0\0\0\0\0"
        for _ in range(size // 12 + 1)
    ]
    return b"".join(records)[:size]


def some_layer(rng: random.Random, prefix: str, budget: int) -> Layer:
    """Returns directories and files; ``budget`` limits the bytes of content, roughly."""
    count = rng.choice([1, 1, 2, 3, 10, 40, 100, 300, 1000, 3000])
    largest = min(5_000_000, max(1, 2 * budget // count))
    layer: Layer = [Entry(prefix, None)]
    folder = prefix
    for number in range(count):
        if number % 20 == 0 and rng.random() < 0.7:
            folder = f"{prefix}/d{number // 20}"
            layer.append(Entry(folder, None))
        size = rng.choice(
            [
                0,
                rng.randrange(1, 64),
                512,
                rng.randrange(1, largest + 1),
                rng.randrange(1, largest + 1),
            ]
        )
        name = (
            f"{folder}/{'long' * 20 if rng.random() < 0.02 else ''}"
            f"f{number}{rng.choice(['.py', '.so', '', '.1'])}"
        )
        layer.append(Entry(name, some_bytes(rng, size), MTIME + rng.choice([0, number, 0.25])))
    return layer


def _place(rng: random.Random, layer: Layer) -> int:
    return rng.choice([0, len(layer) // 2, len(layer) - 1, rng.randrange(len(layer))])


def _file(rng: random.Random, layer: Layer) -> int | None:
    files = [number for number, entry in enumerate(layer) if entry.content]
    return rng.choice([files[0], files[-1], rng.choice(files)]) if files else None


def touch_one(rng: random.Random, layer: Layer) -> Layer:
    """Changes the mtime of one entry: the first, a middle one, the last, or any."""
    at = _place(rng, layer)
    return [*layer[:at], layer[at]._replace(mtime=layer[at].mtime + 86_400), *layer[at + 1 :]]


def touch_all(rng: random.Random, layer: Layer) -> Layer:
    """Changes all mtimes."""
    mtime = MTIME + rng.randrange(1, 10**7)
    return [entry._replace(mtime=mtime) for entry in layer]


def touch_folders(rng: random.Random, layer: Layer) -> Layer:
    """Changes the mtimes of directories."""
    mtime = MTIME + rng.randrange(1, 10**7)
    return [entry if entry.content is not None else entry._replace(mtime=mtime) for entry in layer]


def insert(rng: random.Random, layer: Layer) -> Layer:
    """Adds a file."""
    at = rng.choice([0, _place(rng, layer), len(layer)])
    size = rng.choice([0, 1, 300, 3000, 30_000])
    return [*layer[:at], Entry(f"new{rng.randrange(10**6)}", some_bytes(rng, size)), *layer[at:]]


def remove(rng: random.Random, layer: Layer) -> Layer:
    """Removes an entry."""
    at = _place(rng, layer)
    return [*layer[:at], *layer[at + 1 :]]


def replace(rng: random.Random, layer: Layer) -> Layer:
    """Replaces a file's whole content."""
    return _changed(
        rng, layer, lambda content: some_bytes(rng, rng.choice([len(content), rng.randrange(5000)]))
    )


def edit(rng: random.Random, layer: Layer) -> Layer:
    """Changes a few bytes of a file; their number may change too."""

    def edited(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 10])):
            at = rng.randrange(len(changed) + 1)
            old = rng.choice([0, 1, 40, 300])
            changed[at : at + old] = rng.randbytes(rng.choice([old, old, 0, 1, 30]))
        return bytes(changed)

    return _changed(rng, layer, edited)


def rename(rng: random.Random, layer: Layer) -> Layer:
    """Renames a file."""
    at = _place(rng, layer)
    return [
        *layer[:at],
        layer[at]._replace(name=f"renamed/{rng.randrange(10**6)}"),
        *layer[at + 1 :],
    ]


def reorder(rng: random.Random, layer: Layer) -> Layer:
    """Reorders the entries: all of them, or one."""
    if rng.random() < 0.5:
        return rng.sample(layer, len(layer))
    left = list(layer)
    moved = left.pop(_place(rng, layer))
    left.insert(rng.randrange(len(left) + 1), moved)
    return left


def append(rng: random.Random, layer: Layer) -> Layer:
    """Appends bytes to a file."""
    return _changed(
        rng, layer, lambda content: content + some_bytes(rng, rng.choice([1, 100, 5000]))
    )


def truncate(rng: random.Random, layer: Layer) -> Layer:
    """Cuts off a file's end."""
    return _changed(rng, layer, lambda content: content[: rng.randrange(len(content))])


def _changed(rng: random.Random, layer: Layer, change: Callable[[bytes], bytes]) -> Layer:
    at = _file(rng, layer)
    if at is None:
        return layer
    content = layer[at].content or b""
    return [*layer[:at], layer[at]._replace(content=change(content)), *layer[at + 1 :]]


EDITS: tuple[Edit, ...] = (
    touch_one,
    touch_all,
    touch_folders,
    insert,
    remove,
    replace,
    edit,
    rename,
    reorder,
    append,
    truncate,
)


def swapped(layers: list[Layer], at: int) -> list[Layer]:
    """Swaps two layers."""
    return [*layers[:at], *layers[at : at + 2][::-1], *layers[at + 2 :]]


def split(layers: list[Layer], at: int) -> list[Layer]:
    """Splits a layer in two."""
    half = len(layers[at]) // 2
    return [*layers[:at], layers[at][:half], layers[at][half:], *layers[at + 1 :]]


def joined(layers: list[Layer], at: int) -> list[Layer]:
    """Joins two layers."""
    return [
        *layers[:at],
        [entry for layer in layers[at : at + 2] for entry in layer],
        *layers[at + 2 :],
    ]


LAYER_EDITS = (swapped, split, joined)


def release(seed: int, budget: int = 1_000_000) -> Release:
    """Returns a base of one to four layers, and its target."""
    rng = random.Random(seed)
    form = rng.choice(FORMATS)
    layers = [
        some_layer(rng, f"l{number}", rng.choice([1000, budget // 10, budget]))
        for number in range(rng.choice([1, 1, 2, 4]))
    ]
    target, names = layers, []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(target))
        if rng.random() < 0.2:
            change = rng.choice(LAYER_EDITS)
            target = change(target, at)
            names.append(change.__name__)
        else:
            layer_change = rng.choice(EDITS)
            target = [*target[:at], layer_change(rng, target[at]), *target[at + 1 :]]
            names.append(layer_change.__name__)
    base = [tar_of(layer, form) for layer in layers]
    return Release(
        base, [tar_of(layer, form) for layer in target], f"format {form}: {', '.join(names)}"
    )


def rdiff_streams(base: Sequence[bytes], targets: Sequence[bytes]) -> list[bytes]:
    """Returns the streams of ``rdiff -b 512 -S 32``, as balena-engine makes them, with the base's
    layers in one file.
    """
    made = []
    with tempfile.TemporaryDirectory() as folder:
        old, new, signature, delta = (
            Path(folder, name) for name in ("old", "new", "signature", "delta")
        )
        old.write_bytes(b"".join(base))
        subprocess.run(["rdiff", "-b", "512", "-S", "32", "signature", old, signature], check=True)
        for target in targets:
            new.write_bytes(target)
            subprocess.run(["rdiff", "-f", "delta", signature, new, delta], check=True)
            made.append(delta.read_bytes())
    return made
