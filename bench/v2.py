"""v2 compared with the reference: rsync run as root, with the reference's own arguments, on the
same root filesystems.

The reference reads real trees (real owners, devices and modes), made from ours by rsync itself.
Ours is measured in two ways: the batch alone with several settings of compression and block size;
and the running server, from a device's request to the answer with the batch's URL, with an empty
state directory (fetching, unpacking, recording and proving). The served batch is applied by rsync
and compared with the target entry by entry.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import images, rsync_device, served
from bench.corpus import CACHE, Pair
from bench.results import geometric_mean, table
from obdelta.rsync import batch, remote_shell
from obdelta.rsync.batch import Tuning

PATH = CACHE / "v2.json"
TUNINGS = (Tuning(9, 0), Tuning(6, 0), Tuning(9, 512), batch.DEFAULT_TUNING, Tuning(4, 512))
_REFERENCE = (
    *(
        "--archive",
        "--compress",
        "--checksum",
        "--no-i-r",
        "--delete",
        "--hard-links",
        "--timeout=0",
    ),
    *("--compress-level=9", "--one-file-system"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the batch; wall and processor seconds to write it."""

    size: int
    seconds: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Result:
    """One pair. ``ours`` by setting (``level, block``). ``served``: bytes of the whole stream.
    ``cold``: seconds from the request to the answer; ``again``: the same with the base's root
    filesystem cached. ``full``: bytes of a full update.
    """

    name: str
    counted: bool
    full: int
    entries: int
    reference: Run
    ours: dict[str, Run]
    served: int
    cold: float
    again: float
    applied: float


def label(tuning: Tuning) -> str:
    """Returns the name of a setting in tables."""
    return f"{tuning.level}, {tuning.block or 'rsync’s'}"


def measured(pair: Pair, registry: str) -> Result | None:
    """Measures a pair; returns None without root, which the reference needs."""
    if os.geteuid() != 0:
        return None
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="v2-") as name:
        scratch = Path(name)
        base, target = (
            rsync_device.root_filesystem(image, scratch / side)
            for side, image in (("base", pair.base), ("target", pair.target))
        )
        with (
            _real(base, scratch / "real-base") as real_base,
            _real(target, scratch / "real-target") as real_target,
        ):
            reference = _recorded(
                [
                    "rsync",
                    *_REFERENCE,
                    "--only-write-batch",
                    str(scratch / "batch"),
                    f"{real_target}/",
                    f"{real_base}/",
                ],
                scratch / "batch",
            )
        far = (sys.executable, "-I", "-S", remote_shell.__file__)
        ours = {
            label(tuning): _recorded(
                batch.record_command(scratch / "batch", target, far, tuning),
                scratch / "batch",
                base=base,
            )
            for tuning in TUNINGS
        }
        found = _served(pair, registry, base, target, scratch)
        return Result(
            name=pair.recipe.name,
            counted=pair.recipe.counted,
            full=sum(
                layer.size
                for layer in pair.target.layers
                if layer.diff_id not in pair.base.diff_ids
            ),
            entries=sum(1 + len(folders) + len(files) for _, folders, files in os.walk(target)),
            reference=reference,
            ours=ours,
            served=found[0].pulled_bytes,
            cold=found[0].request_seconds,
            again=found[1].request_seconds,
            applied=found[0].patching_seconds,
        )


@contextmanager
def _real(tree: Path, out: Path) -> Iterator[Path]:
    """Makes the tree as root has it: rsync reads the attributes, and makes real owners and devices
    of them.
    """
    far = f'"{sys.executable}" "{remote_shell.__file__}"'
    options = (
        "--archive",
        "--hard-links",
        "--numeric-ids",
        "--remote-option=--fake-super",
        f"--rsh={far}",
    )
    environment = {**os.environ, remote_shell.BASE: f"{tree}/"}
    subprocess.run(["rsync", *options, "base:/", f"{out}/"], env=environment, check=True)
    try:
        yield out
    finally:
        subprocess.run(["rm", "-rf", out], check=True)


def _recorded(command: list[str], out: Path, *, base: Path | None = None) -> Run:
    environment = (
        dict(os.environ) if base is None else {**os.environ, remote_shell.BASE: f"{base}/"}
    )
    before, started = _children_cpu(), time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, cpu = time.monotonic() - started, _children_cpu() - before
    size = out.stat().st_size
    out.unlink()
    return Run(size, seconds, cpu)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _served(
    pair: Pair, registry: str, base: Path, target: Path, scratch: Path
) -> tuple[rsync_device.Applied, rsync_device.Applied]:
    """Measures the server with an empty state directory, and with the base's root filesystem
    cached.
    """
    host = registry.removeprefix("http://")
    other = served.other_release(pair, scratch)
    names = {
        side: (
            f"{host}/{pair.repository(side)}"
            f"@{images.push(image, registry, pair.repository(side), 'latest')}"
        )
        for side, image in (("base", pair.base), ("target", pair.target), ("other", other))
    }
    found: list[rsync_device.Applied] = []
    for first in ((), ("other",)):
        with served.running(registry, scratch / "state", "balanced") as (address, _):
            for side in first:
                rsync_device.ask(f"http://{address}", names["base"], names[side])
            work = scratch / f"device-{len(found)}"
            work.mkdir()
            found.append(
                rsync_device.update(
                    f"http://{address}",
                    names["base"],
                    names["target"],
                    base,
                    target,
                    pair.target,
                    work,
                )
            )
        subprocess.run(["rm", "-rf", work], check=True)
    return found[0], found[1]


# -- kept, and told ----------------------------------------------------------------------------


def save(results: Sequence[Result], path: Path = PATH) -> None:
    """Saves the results, so that the page can be written again; results of other pairs stay."""
    kept = {result.name: result for result in (*load(path), *results)}
    path.write_text(json.dumps([asdict(result) for result in kept.values()], indent=1))


def load(path: Path = PATH) -> list[Result]:
    """Returns the results that :func:`save` wrote, or nothing."""
    if not path.exists():
        return []
    return [
        Result(
            **{
                **fields,
                "reference": Run(**fields["reference"]),
                "ours": {name: Run(**run) for name, run in fields["ours"].items()},
            }
        )
        for fields in json.loads(path.read_bytes())
    ]


def line(result: Result) -> str:
    """Returns a line to print as soon as a pair is measured."""
    ours = result.ours[label(batch.DEFAULT_TUNING)]
    return (
        f"{result.name:14} v2: reference {result.reference.size:,} in {result.reference.cpu:.1f}"
        f" processor s, ours {ours.size:,} ({ours.size / result.reference.size:.3f}) in"
        f" {ours.cpu:.1f} | served {result.served:,} after {result.cold:.1f} s, base there"
        f" {result.again:.1f} s"
    )


def section(results: Sequence[Result]) -> str:
    """Returns the section of ``docs/benchmarks.md``."""
    if not results:
        return "Not measured in this run: the reference needs root.\n"
    counted = [result for result in results if result.counted]
    rows = [
        (
            result.name,
            f"{result.full:,}",
            f"{result.reference.size:,}",
            *(f"{run.size:,}" for run in result.ours.values()),
            f"{result.ours[_DEFAULT].size / result.reference.size:.3f}",
        )
        for result in results
    ]
    mean = geometric_mean(result.ours[_DEFAULT].size / result.reference.size for result in counted)
    rows.append(("**geometric mean**", "", "", *("" for _ in TUNINGS), f"**{mean:.3f}**"))
    settings = [label(tuning) for tuning in TUNINGS]
    sizes = table(
        ("pair", "full update", "reference", *(f"ours: {one}" for one in settings), "÷ reference"),
        rows,
    )
    times = table(
        (
            "pair",
            "entries",
            "reference s (processor s)",
            *(f"ours: {one}" for one in settings),
            "÷ reference, processor s",
            "served cold s",
            "served, base cached s",
            "applied s",
        ),
        [
            (
                result.name,
                f"{result.entries:,}",
                _seconds(result.reference),
                *(_seconds(run) for run in result.ours.values()),
                f"{result.ours[_DEFAULT].cpu / result.reference.cpu:.2f}",
                f"{result.cold:.1f}",
                f"{result.again:.1f}",
                f"{result.applied:.1f}",
            )
            for result in results
        ],
    )
    return _TEXT.format(
        sizes=sizes, times=times, default=_DEFAULT, **batch.DEFAULT_TUNING._asdict()
    )


_DEFAULT = label(batch.DEFAULT_TUNING)
_TEXT = """\
The reference is rsync with open-balena-delta's arguments: zlib level 9, and blocks as rsync \
chooses them.
It runs as root on real trees.
obdelta needs no root for its trees, and older versions of rsync can read its batches.
Its default is **{default}**: zlib level {level} and blocks of {block} bytes.
The first table shows bytes of the batch:

{sizes}
The second table shows seconds:

- to write the batch alone, with processor seconds of both sides in brackets;
- from a device's request to the answer with the URL of the batch (*served*), which includes \
fetching and unpacking both images, and the proof;
- to apply the batch with rsync.

The server ran as root here; the proof then copies more files than for an ordinary user.

{times}
Every served batch was applied by rsync to the base's root filesystem, and the result was compared \
with the target's, entry by entry.
"""


def _seconds(run: Run) -> str:
    return f"{run.seconds:.1f} ({run.cpu:.1f})"
