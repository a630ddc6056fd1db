"""Delta sizes may not grow unseen: two small pairs, the same bytes every time, against recorded
ceilings and the real peer.

The ceilings are what was measured when they were written, and 2 % for another version of a
compressor. Whoever makes deltas smaller lowers them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import images, peer
from bench.layers import Entry, Layer, file, make_layer
from obdelta.delta.build import Effort, LayerFile, build_layer
from tests.support.images import make_layers

SEED = 20


class Program:
    """A program as a linker lays it out: functions that call each other by distance, a table of
    their addresses, texts.

    A change anywhere moves what follows, and so changes distances and addresses all over: what
    recompiled programs are to deltas.
    """

    def __init__(self, seed: int, functions: int) -> None:
        self._random = random.Random(seed)
        self._opcodes = [
            self._random.randbytes(self._random.choice((1, 2, 3, 3, 4, 5, 7))) for _ in range(900)
        ]
        self._words = [self._random.randbytes(self._random.randint(2, 6)).hex() for _ in range(900)]
        self._names = list(range(functions))
        self._bodies = {name: self._function(functions) for name in self._names}
        self._texts = " ".join(self._random.choices(self._words, k=functions * 12)).encode()

    def _function(self, functions: int) -> list[bytes | int]:
        """Instructions; a number stands for a call of that function."""
        body: list[bytes | int] = []
        for _ in range(self._random.randint(3, 12)):
            body += self._random.choices(self._opcodes, k=self._random.randint(2, 14))
            body.append(self._random.randrange(functions))
        return body

    def change(self) -> None:
        """What a few commits do: functions edited, some added in between, a text inserted."""
        for name in self._random.sample(self._names, len(self._names) // 40):
            body = self._bodies[name]
            at = self._random.randrange(len(body))
            body[at:at] = self._random.choices(self._opcodes, k=self._random.randint(1, 6))
        for _ in range(len(self._names) // 200):
            name = len(self._bodies)
            self._bodies[name] = self._function(len(self._names))
            self._names.insert(self._random.randrange(len(self._names)), name)
        middle = len(self._texts) // 2
        self._texts = self._texts[:middle] + b"a new message" + self._texts[middle:]

    def link(self) -> bytes:
        """The program's bytes."""
        address: dict[int, int] = {}
        at = 0x1000
        for name in self._names:
            address[name] = at
            at += sum(5 if isinstance(each, int) else len(each) for each in self._bodies[name])
            at += -at % 16
        code = bytearray()
        for name in self._names:
            for each in self._bodies[name]:
                if isinstance(each, int):
                    code += b"\xe8" + struct.pack("<i", address[each] - (0x1000 + len(code) + 5))
                else:
                    code += each
            code += b"\xcc" * (-len(code) % 16)
        table = struct.pack(
            f"<{len(self._names)}Q", *(0x400000 + address[name] for name in self._names)
        )
        return b"\x7fELF".ljust(0x1000, b"\0") + bytes(code) + table + self._texts


def program_layers(directory: Path) -> tuple[list[Layer], list[Layer]]:
    """One layer with two programs and a text, in two releases."""
    programs = [Program(SEED, 4000), Program(SEED + 1, 1500)]
    releases = []
    for release in (1, 2):
        entries: list[Entry] = [
            file(
                f"usr/bin/program-{number}",
                program.link(),
                mode=0o755,
                mtime=images.MTIME + release,
            )
            for number, program in enumerate(programs)
        ]
        entries.append(file("usr/share/version", f"release {release}\n".encode()))
        releases.append([make_layer(entries, directory)])
        for program in programs:
            program.change()
    return releases[0], releases[1]


def package_layers(directory: Path) -> tuple[list[Layer], list[Layer]]:
    """The layers of the image that most tests use, without what both images
    share below and above.
    """
    base, target = make_layers(directory, size=6 << 20, seed=SEED)
    return base, target[1:4]


PAIRS = {"program": program_layers, "packages": package_layers}
CEILINGS = {
    ("program", "fast"): 420_000,
    ("program", "balanced"): 315_000,
    ("program", "small"): 242_000,
    ("packages", "fast"): 61_500,
    ("packages", "balanced"): 61_000,
    ("packages", "small"): 60_500,
}
"""Bytes of all delta layers of the pair."""


class Case:
    """A pair's tars on disk, and what the peer makes of them."""

    def __init__(self, name: str, folder: Path) -> None:
        base, target = PAIRS[name](folder / "blobs")
        self.folder = folder
        self.base = [self._tar(layer) for layer in base]
        self.target = [self._tar(layer) for layer in target]
        self.concatenated = folder / "base"
        self.concatenated.write_bytes(b"".join(layer.path.read_bytes() for layer in self.base))
        self.peer = peer.measure(self.concatenated, [layer.path for layer in self.target], folder)

    def _tar(self, layer: Layer) -> LayerFile:
        return LayerFile(
            layer.diff_id, layer.write_tar(self.folder / f"{layer.diff_id.hex}.tar"), layer.tar_size
        )

    def build(self, effort: str) -> Sequence[Path]:
        """The delta layers, each proven by rdiff."""
        made = []
        for number, target in enumerate(self.target):
            out = self.folder / f"{effort}-{number}"
            build_layer(
                self.base,
                target,
                out,
                effort=Effort(effort),
                threads=2,
                index_dir=None,
                progress=None,
            )
            peer.prove(self.concatenated, out, target.diff_id, self.folder)
            made.append(out)
        return made


@pytest.fixture(scope="module", params=sorted(PAIRS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Case]:
    return request.param, Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("effort", "share"), [("fast", 0.95), ("balanced", 0.85), ("small", 0.85)])
def test_deltas_stay_as_small_as_they_were(
    case: tuple[str, Case], effort: str, share: float
) -> None:
    name, pair = case
    made = sum(path.stat().st_size for path in pair.build(effort))
    assert made <= CEILINGS[name, effort], f"{name}, {effort}: {made} bytes"
    assert made <= share * pair.peer.size, (
        f"{name}, {effort}: {made} bytes, the peer needs {pair.peer.size}"
    )
