"""Processor seconds a MB for hostile layers, against ordinary content: ``make bench-hostile``.

Each pattern of :mod:`bench.hostile_images` and :mod:`bench.hostile_layers` goes through what a
build does with layers: inflating, then matching and proving (v3), or unpacking, recording and
proving (v2). Each runs in a child of its own. docs/security.md has the measured figures.

A MB is 1,000,000 bytes of inflated layers, or of the files in them with their holes, or of the
compressed blobs, whichever is most. What an empty pair costs (the start of processes) is
subtracted. A pattern that is refused is as cheap as finding that out was.

The first ratio is against the bytes of an ordinary program. Two more ordinary contents, of large
and of small files, tell what new bytes and entries cost: the second ratio is against both. Work
that is linear in both keeps it small.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.hostile_images import (
    HOSTILE,
    Blobs,
    Images,
    Member,
    large_files,
    ordinary,
    small_files,
    tar,
)
from bench.hostile_layers import PATTERNS
from obdelta.builds.inputs.layer_inputs import inflate_limit
from obdelta.delta.build import Effort, LayerBuilder, LayerFile
from obdelta.delta.inflate import import_layer
from obdelta.errors import LayerInvalid
from obdelta.rootfs.apply_layer import Limits
from obdelta.rootfs.tar import members
from obdelta.rootfs.unpack import unpack

Kind = Literal["v2", "v3"]
ORDINARY = ("nothing", "ordinary", "large_files", "small_files")
KINDS: tuple[Kind, ...] = ("v2", "v3")
MB = 1_000_000
GOAL = 5.0
SECONDS = 300
"""What a pattern may take before it is ended, and counts as that much."""
MOST = 1 << 34
LEAST_MB = 0.1
"""Less counts as that: what is measured then is the machine's noise."""


@dataclass(frozen=True, slots=True)
class Cost:
    """``refused``: why, empty where both images were taken."""

    seconds: float
    mb: float
    entries: int
    refused: str = ""

    @property
    def each(self) -> float:
        """Processor seconds a MB."""
        return self.seconds / max(self.mb, LEAST_MB)


def patterns() -> dict[str, Any]:
    """All of them by name, the ordinary one and the empty one too."""
    named = {pattern.__name__: pattern for pattern in HOSTILE}
    named |= {f"matching: {name}": functools.partial(_matching, name) for name in PATTERNS}
    return {
        "nothing": lambda size: ([tar([])], [tar([])]),
        "ordinary": ordinary,
        "large_files": large_files,
        "small_files": small_files,
        **named,
    }


def _matching(name: str, size: int) -> Images:
    """A pattern against the matching of v3; what is no tar is a file in one."""
    base, target = (
        part if part[257:262] == b"ustar" else tar([Member("file", part)])
        for part in PATTERNS[name](size)
    )
    return [base], [target]


# -- in the child ------------------------------------------------------------------------------


def _imported(blobs: Blobs, directory: Path) -> list[LayerFile]:
    directory.mkdir()
    files = []
    for number, blob in enumerate(blobs):
        source, out = directory / f"{number}.blob", directory / f"{number}.tar"
        source.write_bytes(blob)
        imported = import_layer(source, out, limit=inflate_limit(len(blob), MOST))
        files.append(LayerFile(imported.diff_id, out, imported.size))
    return files


def _v3(base: list[LayerFile], target: list[LayerFile], directory: Path) -> None:
    known = {layer.diff_id for layer in base}
    with LayerBuilder(base, effort=Effort.BALANCED, threads=1, index_dir=None) as builder:
        for number, layer in enumerate(target):
            wanted = layer.diff_id if layer.diff_id in known else layer
            builder.build(wanted, directory / f"{number}.delta", None)


def _v2(base: list[LayerFile], target: list[LayerFile], blobs: Images, directory: Path) -> int:
    """Returns the bytes of both trees' files."""
    size = 0
    for name, layers, compressed in (
        ("base-tree", base, blobs[0]),
        ("target-tree", target, blobs[1]),
    ):
        limits = Limits(size=inflate_limit(sum(map(len, compressed)), MOST))
        size += unpack(
            [(layer.diff_id, layer.path) for layer in layers], directory / name, limits=limits
        ).size
    job = {
        "base": str(directory / "base-tree/root"),
        "target": str(directory / "target-tree/root"),
        "docker_config": None,
        "out": str(directory / "stream"),
        "scratch": str(directory / "scratch"),
        "level": 6,
        "block": 512,
        "forecast": False,
        "niceness": 0,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "obdelta.rsync.recorder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        if child.stdin is None or child.stdout is None:
            raise AssertionError("both are pipes")
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        last = child.stdout.readlines()[-1]
    if "proven" not in last:
        raise LayerInvalid("pair", last.strip())
    return size


def measure_here(name: str, kind: Kind, size: int, directory: Path) -> Cost:
    """Builds one pattern's delta in this process and its children."""
    blobs: Images = patterns()[name](size)
    begun = _processor_seconds()
    inflated, refused, files = 0, "", 0
    layers: list[LayerFile] = []
    try:
        base, target = (_imported(blobs[number], directory / str(number)) for number in (0, 1))
        layers = [*base, *target]
        inflated = sum(layer.size for layer in layers)
        if kind == "v3":
            _v3(base, target, directory)
        else:
            files = _v2(base, target, blobs, directory)
    except LayerInvalid as error:
        refused = str(error)
    compressed = sum(map(len, (*blobs[0], *blobs[1])))
    seconds = _processor_seconds() - begun
    return Cost(seconds, max(inflated, files, compressed) / MB, sum(map(_entries, layers)), refused)


def _entries(layer: LayerFile) -> int:
    count = 0
    with layer.path.open("rb") as file, contextlib.suppress(LayerInvalid):
        for _ in members(file.fileno(), "the layer"):
            count += 1
    return count


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# -- the report --------------------------------------------------------------------------------


def measured(name: str, kind: Kind, size: int) -> Cost:
    """The same in a child."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as directory:
        command = [
            sys.executable,
            "-m",
            "bench.hostile",
            "--one",
            name,
            "--kind",
            kind,
            "--size",
            str(size),
        ]
        try:
            ran = subprocess.run(
                [*command, "--directory", directory],
                capture_output=True,
                text=True,
                check=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Cost(SECONDS, 2 * size / MB, 0, f"ended after {SECONDS} s")
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{name} ({kind}): {error.stderr}") from error
    return Cost(**json.loads(ran.stdout))


def report(size: int, names: list[str]) -> float:
    """Prints a table; returns the worst ratio."""
    startup = {kind: measured("nothing", kind, size).seconds for kind in KINDS}

    def cost(name: str, kind: Kind) -> Cost:
        found = measured(name, kind, size)
        return replace(found, seconds=max(0.0, found.seconds - startup[kind]))

    usual = {kind: _prices(cost("large_files", kind), cost("small_files", kind)) for kind in KINDS}
    plain = {kind: cost("ordinary", kind).each for kind in KINDS}
    for kind, (a_mb, an_entry) in usual.items():
        parts = f"{a_mb:.4f} s a MB and {an_entry * 1000:.4f} s for 1,000 entries"
        print(
            f"ordinary content, {kind}: {plain[kind]:.4f} s a MB; told apart: {parts}", flush=True
        )
    print(
        "| pattern | v2: s a MB | ÷ ordinary | ÷ bytes and entries | v3: s a MB | ÷ ordinary | ÷"
        " bytes and entries | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    worst, which = 0.0, ""
    for name in names:
        row, why = [], ""
        for kind in KINDS:
            found = cost(name, kind)
            a_mb, an_entry = usual[kind]
            mb = max(found.mb, LEAST_MB)
            ratio = found.seconds / (a_mb * mb + an_entry * found.entries)
            row += [f"{found.each:.3f}", f"{found.each / plain[kind]:.1f}", f"{ratio:.1f}"]
            why = why or (f"refused by {kind}" if found.refused else "")
            if ratio > worst:
                worst, which = ratio, f"{name}, {kind}"
        print(f"| {name.replace('_', ' ')} | {' | '.join(row)} | {why} |", flush=True)
    print(f"worst ratio to bytes and entries: {worst:.1f} ({which}); the goal is {GOAL:g}")
    return worst


def _prices(large: Cost, small: Cost) -> tuple[float, float]:
    """Returns the seconds of a MB and of an entry that explain both contents."""
    an_entry = (small.seconds * large.mb - large.seconds * small.mb) / (
        small.entries * large.mb - large.entries * small.mb
    )
    an_entry = max(an_entry, 0.0)
    return max(large.seconds - an_entry * large.entries, 0.5 * large.seconds) / large.mb, an_entry


def main() -> int:
    """Exit status 1 where the goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.add_argument(
        "--size", type=int, default=4 * MB, help="about how many bytes an image has"
    )
    parser.add_argument("--only", action="append", help="a pattern; may be given more than once")
    for hidden in ("--one", "--kind", "--directory"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        found = measure_here(asked.one, asked.kind, asked.size, Path(asked.directory))
        print(json.dumps(asdict(found)))
        return 0
    return int(
        report(asked.size, asked.only or [name for name in patterns() if name not in ORDINARY])
        > GOAL
    )


if __name__ == "__main__":
    sys.exit(main())
