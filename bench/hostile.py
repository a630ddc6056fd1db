"""Processor seconds a MB for hostile layers, compared with ordinary content: ``make
bench-hostile``.

Each pattern (tars, compression, contents, matching: ``bench/hostile_*.py``) runs through the work
of a build: inflating, then matching and proving (v3), or unpacking, recording and proving (v2).
Each runs in a separate child process. docs/security.md has the measured figures.

A MB is 1,000,000 bytes of inflated layers, of the files in them with their holes, or of the
compressed blobs, whichever is most. The cost of an empty pair (the start of processes) is part of
every build: it is subtracted, and printed. A refused pattern costs the time until it is refused.
Other work on the machine can only increase the measured times. So references, and patterns near
the goal, are run several times, and the least result counts.

The first ratio compares with the bytes of an ordinary program. The second one compares with new
bytes and entries: their costs come from two more ordinary contents, of large and of small files.
If work is linear in both, this ratio is small.
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

from bench.hostile_compression import COMPRESSION
from bench.hostile_contents import CONTENTS
from bench.hostile_images import (
    Blobs,
    Images,
    Member,
    large_files,
    ordinary,
    small_files,
    tar,
)
from bench.hostile_layers import PATTERNS
from bench.hostile_trees import TREES
from obdelta.builds.inputs.work_limits import inflate_limit
from obdelta.delta.build import Effort, LayerBuilder, LayerFile
from obdelta.delta.inflate import import_layer
from obdelta.errors import LayerInvalid
from obdelta.oci import Form
from obdelta.rootfs.bounds import Limits
from obdelta.rootfs.tar import members
from obdelta.rootfs.unpack import unpack

Kind = Literal["v2", "v3"]
ORDINARY = ("nothing", "ordinary", "large_files", "small_files")
KINDS: tuple[Kind, ...] = ("v2", "v3")
MB = 1_000_000
GOAL = 5.0
SECONDS = 300
"""Seconds after which a pattern is stopped; this time then counts as its cost."""
MAX_BYTES = 1 << 34
MIN_MB = 0.1
"""Smaller measurements are replaced by this one, because they are only noise of the machine."""
RUNS = 3
NEAR = 0.6
"""The fraction of the goal from which a pattern is measured again."""


@dataclass(frozen=True, slots=True)
class Cost:
    """``refused``: the reason; empty if both images were accepted."""

    seconds: float
    mb: float
    entries: int
    refused: str = ""

    @property
    def each(self) -> float:
        """Processor seconds a MB."""
        return self.seconds / max(self.mb, MIN_MB)


def patterns() -> dict[str, Any]:
    """Returns all patterns by name, the ordinary and the empty one too."""
    named = {pattern.__name__: pattern for pattern in (*TREES, *COMPRESSION, *CONTENTS)}
    named |= {f"matching: {name}": functools.partial(_matching, name) for name in PATTERNS}
    return {
        "nothing": lambda size: ([tar([])], [tar([])]),
        "ordinary": ordinary,
        "large_files": large_files,
        "small_files": small_files,
        **named,
    }


def _matching(name: str, size: int) -> Images:
    """Returns a pattern for the matching of v3; other content than tars becomes a file in a tar."""
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
        imported = import_layer(source, out, limit=inflate_limit(len(blob), MAX_BYTES))
        files.append(LayerFile(imported.diff_id, out, imported.size))
    return files


def _v3(base: list[LayerFile], target: list[LayerFile], directory: Path) -> None:
    known = {layer.diff_id for layer in base}
    with LayerBuilder(base, effort=Effort.BALANCED, threads=1, index_dir=None) as builder:
        for number, layer in enumerate(target):
            wanted = layer.diff_id if layer.diff_id in known else layer
            builder.build(wanted, {Form.GZIP: directory / f"{number}.delta"})


def _v2(base: list[LayerFile], target: list[LayerFile], blobs: Images, directory: Path) -> int:
    """Returns the bytes of both trees' files."""
    size = 0
    for name, layers, compressed in (
        ("base-tree", base, blobs[0]),
        ("target-tree", target, blobs[1]),
    ):
        limits = Limits(size=inflate_limit(sum(map(len, compressed)), MAX_BYTES))
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
    """Builds one pattern's delta in a child process."""
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


def quickest(name: str, kind: Kind, size: int, runs: int = RUNS) -> Cost:
    """Returns the cheapest of several runs."""
    return min((measured(name, kind, size) for _ in range(runs)), key=lambda cost: cost.seconds)


class Reference:
    """The costs of ordinary content: a build of nothing, a MB, an entry; in seconds of one kind."""

    def __init__(self, kind: Kind, size: int) -> None:
        self._kind, self._size = kind, size
        self.build = quickest("nothing", kind, size).seconds
        large, small, plain = (
            self._cost(quickest(name, kind, size))
            for name in ("large_files", "small_files", "ordinary")
        )
        self.a_mb, self.an_entry = _prices(large, small)
        self.ordinary = plain.each

    def _cost(self, found: Cost) -> Cost:
        return replace(found, seconds=max(0.0, found.seconds - self.build))

    def ratio(self, cost: Cost) -> float:
        """Returns the seconds of a pattern, divided by those for its bytes and entries."""
        price = self.a_mb * max(cost.mb, MIN_MB) + self.an_entry * cost.entries
        return cost.seconds / price

    def measured(self, name: str) -> Cost:
        """Returns a pattern's cost without that of nothing; near the goal the least of several
        runs.
        """
        cost = self._cost(measured(name, self._kind, self._size))
        if self.ratio(cost) < NEAR * GOAL:
            return cost
        again = self._cost(quickest(name, self._kind, self._size, RUNS - 1))
        return min(cost, again, key=lambda one: one.seconds)


def report(size: int, names: list[str]) -> float:
    """Prints a table; returns the worst ratio."""
    references = {kind: Reference(kind, size) for kind in KINDS}
    for kind, usual in references.items():
        print(
            f"ordinary content, {kind}: {usual.ordinary:.4f} s a MB; told apart: {usual.build:.3f}"
            f" s a build, {usual.a_mb:.4f} s a MB and {usual.an_entry * 1000:.4f} s for 1,000"
            " entries",
            flush=True,
        )
    print(
        "| pattern | v2: s a MB | ÷ ordinary | ÷ bytes and entries | v3: s a MB | ÷ ordinary | ÷"
        " bytes and entries | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    worst, which = 0.0, ""
    for name in names:
        row, why = [], ""
        for kind, usual in references.items():
            found = usual.measured(name)
            ratio = usual.ratio(found)
            row += [f"{found.each:.3f}", f"{found.each / usual.ordinary:.1f}", f"{ratio:.1f}"]
            why += f"{kind} refuses it. " if found.refused else ""
            if ratio > worst:
                worst, which = ratio, f"{name}, {kind}"
        print(f"| {name.replace('_', ' ')} | {' | '.join(row)} | {why.strip()} |", flush=True)
    print(f"worst ratio to bytes and entries: {worst:.1f} ({which}); the goal is {GOAL:g}")
    return worst


def _prices(large: Cost, small: Cost) -> tuple[float, float]:
    """Returns the seconds for a MB and for an entry that explain the costs of both contents."""
    an_entry = (small.seconds * large.mb - large.seconds * small.mb) / (
        small.entries * large.mb - large.entries * small.mb
    )
    an_entry = max(an_entry, 0.0)
    return max(large.seconds - an_entry * large.entries, 0.5 * large.seconds) / large.mb, an_entry


def main() -> int:
    """Runs the benchmark; the exit status is 1 if the goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.add_argument(
        "--size", type=int, default=4 * MB, help="about how many bytes an image has"
    )
    parser.add_argument("--only", action="append", help="a pattern; may be given more than once")
    for hidden in ("--one", "--kind", "--directory"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.one:
        found = measure_here(parsed.one, parsed.kind, parsed.size, Path(parsed.directory))
        print(json.dumps(asdict(found)))
        return 0
    return int(
        report(parsed.size, parsed.only or [name for name in patterns() if name not in ORDINARY])
        > GOAL
    )


if __name__ == "__main__":
    sys.exit(main())
