"""The commonest kinds of release, compared with rdiff: most of a layer is unchanged, and the
change is small.

The layers are the standard library of the running Python, which is on every machine: its tests as
a layer of dependencies, everything else as the application's ``COPY`` layer. ``rdiff`` replaces
the engine.
"""

from __future__ import annotations

import json
import random
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import peer
from bench.corpus import CACHE
from bench.layers import Entry, file, from_tree, make_layer, tidied
from bench.results import EFFORTS, geometric_mean, table
from obdelta.delta.build import Effort, LayerBuilder, LayerFile
from obdelta.oci import Form

PATH = CACHE / "releases.json"
BEFORE, AFTER = 1_700_000_000, 1_700_604_800
"""Mtimes of the two releases."""
GOAL = 0.20
Layers = list[list[Entry]]


@dataclass(frozen=True, slots=True)
class Result:
    """One kind of release: bytes of the delta layers by effort, and of rdiff's; ``full``: bytes of
    the target's tars.
    """

    name: str
    kind: str
    full: int
    rdiff: int
    ours: dict[str, int]

    @property
    def ratio(self) -> float:
        """Bytes as a share of rdiff's."""
        return self.ours["balanced"] / self.rdiff


def _tree(*parts: str) -> list[Entry]:
    root = Path(sysconfig.get_path("stdlib"), *parts)
    entries = [
        entry
        for entry in from_tree(root, f"app/{'/'.join(parts)}".rstrip("/"), mtime=BEFORE)
        if "__pycache__" not in entry.info.name and "site-packages" not in entry.info.name
    ]
    return tidied(entries)


def _touched(entry: Entry) -> Entry:
    return Entry(entry.info.replace(mtime=AFTER, deep=False), entry.content)


def _line_changed(layer: list[Entry]) -> list[Entry]:
    """Changes one line of a file in the middle."""
    texts = [
        number
        for number, entry in enumerate(layer)
        if entry.info.name.endswith(".py") and entry.info.size > 2000
    ]
    at = texts[len(texts) // 2]
    source = layer[at].content
    if not isinstance(source, Path | bytes):
        raise TypeError("a file of the layer is neither bytes nor a path")
    content = source.read_bytes() if isinstance(source, Path) else source
    middle = content.index(b"\n", len(content) // 2) + 1
    end = content.index(b"\n", middle)
    changed = file(
        layer[at].info.name,
        content[:middle] + b"    return 'release 2'" + content[end:],
        mtime=AFTER,
    )
    return [*layer[:at], changed, *layer[at + 1 :]]


def _one_line(base: Layers) -> Layers:
    return [base[0], _line_changed(base[1])]


def _one_line_new_mtimes(base: Layers) -> Layers:
    return [base[0], [_touched(entry) for entry in _line_changed(base[1])]]


def _folders_touched(base: Layers) -> Layers:
    return [base[0], [_touched(entry) if entry.info.isdir() else entry for entry in base[1]]]


def _added_first(base: Layers) -> Layers:
    added = file("app/.release", b"release 2, built from 0123456789abcdef\n", mtime=AFTER)
    return [base[0], [base[1][0], added, *base[1][1:]]]


def _repacked(base: Layers) -> Layers:
    return [random.Random(1).sample(base[0], len(base[0])), base[1]]


def _split(base: Layers) -> Layers:
    half = len(base[0]) // 2
    return [base[0][:half], base[0][half:], base[1]]


KINDS: tuple[tuple[str, str, Callable[[Layers], Layers]], ...] = (
    ("one-line", "one line changed in one file of a COPY layer", _one_line),
    ("one-line-mtimes", "the same, and all mtimes of the layer are new", _one_line_new_mtimes),
    ("folder-mtimes", "a layer rebuilt: directories have new mtimes", _folders_touched),
    ("added-first", "a small file added at a layer's beginning", _added_first),
    ("repacked", "a layer of dependencies packed in another order", _repacked),
    ("split", "a layer split in two", _split),
)


def measure(layers: Layers, change: Callable[[Layers], Layers], name: str, kind: str) -> Result:
    """Builds the layers that the base does not have, with every effort and with rdiff."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        base = _written(layers, folder)
        known = {layer.diff_id for layer in base}
        target = [layer for layer in _written(change(layers), folder) if layer.diff_id not in known]
        whole = folder / "base"
        with whole.open("wb") as out:
            for layer in base:
                out.write(layer.path.read_bytes())
        reference = peer.measure(whole, [layer.path for layer in target], folder)
        ours = {}
        for effort in Effort:
            with LayerBuilder(base, effort=effort, threads=2) as builder:
                ours[effort.value] = sum(
                    builder.build(layer, {Form.GZIP: folder / "out"})[Form.GZIP].size
                    for layer in target
                )
    return Result(name, kind, sum(layer.size for layer in target), reference.size, ours)


def _written(layers: Layers, folder: Path) -> list[LayerFile]:
    made = []
    for entries in layers:
        tar = folder / "tar"
        layer = make_layer(entries, folder, level=1, tidy=False, tar_path=tar)
        made.append(
            LayerFile(
                layer.diff_id, tar.replace(folder / f"{layer.diff_id.hex}.tar"), layer.tar_size
            )
        )
    return made


def run() -> list[Result]:
    """Measures all kinds, prints a line for each, and keeps the figures for the page."""
    application = [entry for entry in _tree() if not entry.info.name.startswith("app/test")]
    layers = [_tree("test"), application]
    found = []
    for name, kind, change in KINDS:
        found.append(measure(layers, change, name, kind))
        print(line(found[-1]), flush=True)
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps([asdict(result) for result in found], indent=1))
    return found


def load(path: Path = PATH) -> list[Result]:
    """Returns the figures of :func:`run`; nothing if it was not run."""
    return [Result(**fields) for fields in json.loads(path.read_bytes())] if path.exists() else []


def line(result: Result) -> str:
    """Returns one line for the terminal."""
    ours = " ".join(f"{effort} {result.ours[effort]:,}" for effort in EFFORTS)
    return (
        f"{result.name:16} full {result.full:,} rdiff {result.rdiff:,} {ours} ({result.ratio:.3f})"
    )


def section(results: Sequence[Result]) -> str:
    """Returns the section of ``docs/benchmarks.md``."""
    if not results:
        return "Not measured in this run: `make bench ARGS=--releases` measures them.\n"
    rows = [
        (
            result.name,
            result.kind,
            f"{result.full:,}",
            f"{result.rdiff:,}",
            *(f"{result.ours[effort]:,}" for effort in EFFORTS),
            f"{result.ratio:.3f}",
            "met" if result.ratio <= GOAL else "**not met**",
        )
        for result in results
    ]
    worst = max(results, key=lambda result: max(result.ours.values()) / result.rdiff)
    heads = (
        "release",
        "what changed",
        "tar",
        "rdiff",
        *EFFORTS,
        "balanced ÷ rdiff",
        f"≤ {GOAL:.2f}",
    )
    return (
        "In these releases most of a layer is unchanged.\n"
        "The table shows bytes of the layers that differ, compressed.\n"
        "`make bench ARGS=--releases` measures them with Python's standard library as content.\n\n"
        + table(heads, rows)
        + "\nA layer in another order cannot meet the goal: the order of n entries alone takes"
        " log2(n!) bits, which is more than 0.20 of rdiff's bytes.\n"
        + f"The geometric mean is {geometric_mean(result.ratio for result in results):.3f}.\n"
        f"The largest ratio of any effort is {max(worst.ours.values()) / worst.rdiff:.3f}"
        f" ({worst.name}).\n"
    )
