"""Delta sizes may not grow unnoticed: two small pairs with fixed bytes, against recorded limits
and the real open-balena-delta.

The limits are the sizes measured when they were written, plus 2 % for another version of a
compressor. A change that makes deltas smaller lowers them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench import images, peer
from bench.layers import Entry, Layer, file, make_layer
from obdelta.delta.build import Effort, LayerFile, build_layer
from obdelta.delta.effort import DEFAULT_PRICES
from obdelta.oci import Form
from tests.support.images import make_layers

SEED = 20


class Program:
    """A program as a linker writes it: functions that call each other by distance, a table of
    their addresses, texts.

    Any change moves the bytes after it, and so changes distances and addresses all over:
    recompiled programs are like this.
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
        """Returns instructions; a number is a call of that function."""
        body: list[bytes | int] = []
        for _ in range(self._random.randint(3, 12)):
            body += self._random.choices(self._opcodes, k=self._random.randint(2, 14))
            body.append(self._random.randrange(functions))
        return body

    def change(self) -> None:
        """Changes a tree as a few commits do: functions edited, some added in between, a text
        inserted.
        """
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
        """Returns the program's bytes."""
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
    """Returns one layer with two programs and a text, in two releases."""
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
    """Returns the layers of the image that most tests use, without the shared layers below and
    above.
    """
    base, target = make_layers(directory, size=6 << 20, seed=SEED)
    return base, target[1:4]


PAIRS = {"program": program_layers, "packages": package_layers}
PRICES = {"metered": dict.fromkeys(Form, 0.0), "default": DEFAULT_PRICES}
CEILINGS = {
    ("packages", "fast", Form.GZIP, "metered"): 62_500,
    ("packages", "fast", Form.GZIP, "default"): 91_000,
    ("packages", "fast", Form.ZSTD, "metered"): 57_000,
    ("packages", "fast", Form.ZSTD, "default"): 127_500,
    ("packages", "balanced", Form.GZIP, "metered"): 66_500,
    ("packages", "balanced", Form.GZIP, "default"): 91_000,
    ("packages", "balanced", Form.ZSTD, "metered"): 58_000,
    ("packages", "balanced", Form.ZSTD, "default"): 126_000,
    ("packages", "small", Form.GZIP, "metered"): 65_500,
    ("packages", "small", Form.GZIP, "default"): 87_500,
    ("packages", "small", Form.ZSTD, "metered"): 60_000,
    ("packages", "small", Form.ZSTD, "default"): 126_000,
    ("program", "fast", Form.GZIP, "metered"): 358_500,
    ("program", "fast", Form.GZIP, "default"): 711_000,
    ("program", "fast", Form.ZSTD, "metered"): 347_500,
    ("program", "fast", Form.ZSTD, "default"): 850_500,
    ("program", "balanced", Form.GZIP, "metered"): 270_000,
    ("program", "balanced", Form.GZIP, "default"): 709_000,
    ("program", "balanced", Form.ZSTD, "metered"): 246_500,
    ("program", "balanced", Form.ZSTD, "default"): 839_500,
    ("program", "small", Form.GZIP, "metered"): 250_500,
    ("program", "small", Form.GZIP, "default"): 697_500,
    ("program", "small", Form.ZSTD, "metered"): 233_000,
    ("program", "small", Form.ZSTD, "default"): 839_500,
}
"""Limits for the bytes of all delta layers of the pair, and for these plus the price of its
copies, two commands for each.
"""


class Case:
    """A pair's tars on disk, and open-balena-delta's delta of them."""

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

    def build(self, effort: str, form: Form, prices: Mapping[Form, float]) -> tuple[int, float]:
        """Returns the bytes of the delta layers, and these plus the price of their copies. Each
        layer is proven by rdiff.
        """
        size, copies = 0, 0
        for number, target in enumerate(self.target):
            out = self.folder / f"{effort}-{number}"
            made = build_layer(
                self.base,
                target,
                out,
                form=form,
                prices=prices,
                effort=Effort(effort),
                threads=2,
            )
            peer.prove(self.concatenated, out, target.diff_id, self.folder)
            size += out.stat().st_size
            copies += made.copies
        return size, size + 2 * copies * prices[form]


@pytest.fixture(scope="module", params=sorted(PAIRS))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Case]:
    return request.param, Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("link", PRICES)
@pytest.mark.parametrize(("effort", "share"), [("fast", 0.95), ("balanced", 0.85), ("small", 0.85)])
def test_deltas_do_not_grow(
    case: tuple[str, Case], effort: str, share: float, link: str, form: Form
) -> None:
    name, pair = case
    size, cost = pair.build(effort, form, PRICES[link])
    assert cost <= CEILINGS[name, effort, form, link], f"{name}, {effort}: {cost:.0f}"
    if link == "metered":
        assert size <= share * pair.peer.size, (
            f"{name}, {effort}: {size} bytes, the peer needs {pair.peer.size}"
        )
