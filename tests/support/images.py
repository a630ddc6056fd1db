"""Two small releases of a synthetic image, with the same bytes every time; most tests build deltas
from them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from bench.images import (
    Compression,
    Entry,
    Format,
    Image,
    Layer,
    directory,
    file,
    hardlink,
    make_image,
    make_layer,
    symlink,
    whiteout,
)

BASE_REPOSITORY = "v2/" + "a1" * 16
TARGET_REPOSITORY = "v2/" + "b2" * 16


@dataclass(frozen=True, slots=True)
class Pair:
    """``root`` can be used as ``oci:root``: it holds a layout for each of the two repositories,
    both tagged ``latest``.
    """

    root: Path
    base: Image
    target: Image


def make_pair(
    root: Path,
    *,
    size: int = 256 * 1024,
    seed: int = 1,
    compression: Compression = "gzip",
    format: Format = "docker",
) -> Pair:
    """Two releases with about ``size`` bytes of files each, in 5 and 6 layers.

    | layer | base → target |
    |---|---|
    | 0 system | the same (the common prefix): directories, links, text, an executable |
    | 1 runtime | executables with edits that shift what follows |
    | 2 dependencies | files changed, added, deleted, moved, one replaced by other content |
    | 3 app | small texts edited; the target has whiteouts |
    | 4 assets | the same diff_id, above layers that differ: one copy |
    | 5 (target only) | an empty tar |
    """
    blobs = root / ".blobs"
    base, target = make_layers(blobs, size=size, seed=seed, compression=compression)
    return Pair(
        root,
        make_image(base, root / BASE_REPOSITORY, format=format, labels={"release": "1"}),
        make_image(target, root / TARGET_REPOSITORY, format=format, labels={"release": "2"}),
    )


def make_layers(
    directory: Path, *, size: int = 256 * 1024, seed: int = 1, compression: Compression = "gzip"
) -> tuple[list[Layer], list[Layer]]:
    """The layers of :func:`make_pair`, bottom to top, as blobs in ``directory``."""
    source = _Source(seed, size)
    base, target = source.releases()
    made = [
        [make_layer(entries, directory, compression=compression) for entries in layers]
        for layers in (base, target)
    ]
    return made[0], made[1]


class _Source:
    """Content from a seed: text of a small vocabulary, code of recurring words with drifting
    addresses, noise.
    """

    def __init__(self, seed: int, size: int) -> None:
        self._random = random.Random(seed)
        self._unit = max(size // 32, 64)
        self._words = [self._random.randbytes(self._random.randint(1, 5)).hex() for _ in range(400)]
        self._opcodes = [self._random.randbytes(8) for _ in range(300)]

    def text(self, length: int) -> bytes:
        words = " ".join(self._random.choices(self._words, k=length // 6 + 1))
        return words.encode()[: length - 1] + b"\n"

    def code(self, length: int) -> bytes:
        return b"".join(self._random.choices(self._opcodes, k=length // 8 + 1))[:length]

    def noise(self, length: int) -> bytes:
        return self._random.randbytes(length)

    def relinked(self, code: bytes) -> bytes:
        """Changes code as a new build does: a few insertions and deletions, and changed addresses
        all over.
        """
        changed = bytearray(code)
        for _ in range(4):
            at = self._random.randrange(len(changed))
            changed[at : at + self._random.randrange(8)] = self.noise(self._random.randrange(1, 24))
        for at in range(0, len(changed) - 4, self._random.randrange(700, 900)):
            changed[at : at + 2] = self.noise(2)
        return bytes(changed)

    def edited(self, text: bytes) -> bytes:
        """Changes a text as a person does: a line in the middle, a word elsewhere."""
        middle = len(text) // 2
        return text[:middle] + self.text(60) + text[middle:-9] + b"the end.\n"

    def releases(self) -> tuple[list[list[Entry]], list[list[Entry]]]:
        """Returns the entries of both images' layers."""
        unit = self._unit
        system = [
            directory("etc", mtime=1_690_000_000),
            file("etc/hostname", b"device\n"),
            file("etc/shadow", self.text(200), mode=0o640, gid=42),
            file("bin/busybox", self.code(unit * 4), mode=0o4755),
            symlink("bin/sh", "busybox"),
            hardlink("bin/cat", "bin/busybox"),
            directory("tmp", mode=0o1777),
            file("usr/share/licence.txt", self.text(unit * 2)),
            file("usr/share/" + "long-name/" * 14 + "é", b"a pax header goes before me"),
        ]
        interpreter, library = self.code(unit * 6), self.code(unit * 2)
        runtime = [
            file("usr/bin/interpreter", interpreter, mode=0o755),
            file("usr/lib/libruntime.so.1.2", library),
        ]
        new_runtime = [
            file("usr/bin/interpreter", self.relinked(interpreter), mode=0o755),
            file("usr/lib/libruntime.so.1.3", self.relinked(library)),
        ]
        modules = {
            f"usr/lib/modules/m{number:02}.txt": self.text(unit // 4) for number in range(12)
        }
        native, table = self.code(unit * 3), self.noise(unit * 2)
        dependencies = [*(file(name, content) for name, content in modules.items())]
        dependencies += [
            file("usr/lib/modules/native.so", native),
            file("usr/lib/modules/table.bin", table),
        ]
        names = list(modules)
        kept = {name: modules[name] for name in names[2:]}  # m00 and m01 are deleted
        kept[names[3]] = self.edited(kept[names[3]])
        kept[names[4]] = self.text(unit // 4)
        kept["usr/lib/moved/" + names[5].rpartition("/")[2]] = kept.pop(names[5])
        kept["usr/lib/modules/added.txt"] = self.text(unit // 2)
        new_dependencies = [
            file(name, content, mtime=1_710_000_000) for name, content in kept.items()
        ]
        new_dependencies += [
            file("usr/lib/modules/native.so", self.relinked(native)),
            file("usr/lib/modules/vendored/table.bin", table),
        ]
        main, page = self.text(unit // 2), self.text(unit)
        app = [
            file("app/main.txt", main),
            file("app/page.txt", page),
            file("app/old.txt", self.text(100)),
        ]
        new_app = [
            file("app/main.txt", self.edited(main), mtime=1_710_000_000),
            file("app/page.txt", page),
            whiteout("usr/share/licence.txt"),
        ]
        assets = [
            file("app/assets/picture", self.noise(unit * 4)),
            file("app/assets/font", self.code(unit)),
        ]
        return (
            [system, runtime, dependencies, app, assets],
            [system, new_runtime, new_dependencies, new_app, assets, []],
        )
