"""``docs/benchmarks.md``: the measured figures in words and tables."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import obdelta
from bench import releases, v2
from bench.corpus import CACHE
from bench.direct import Figures
from bench.results import EFFORTS, Result, geometric_mean

DOCS = CACHE.parent / "docs"
PAGE, PLOT = DOCS / "benchmarks.md", DOCS / "benchmarks.png"
MB = 10**6
"""Of memory and of times; copies are counted for each 2^20 bytes of target."""

_TOP = """\
# Benchmarks

Written by `make bench`; do not edit. {date}, obdelta {version}, {machine}.

Each pair is two releases of an image made of published packages in two versions, pushed to a real registry (Debian's
`docker-registry`) on loopback. **The peer** is `rdiff -b 512 -S 32` over the concatenated base, for each layer from the first
that differs on, and `gzip -6`: the bytes of balena-engine's own delta builder within 3 %. It was run in the same run on the same
layers, which lay on disk uncompressed; its time is signature + delta + gzip, one after the other on one core, as these programs
run. obdelta uses both cores, and its time goes from the request to the published manifest: within it obdelta fetches the images
from the registry, inflates, hashes, matches, deflates and proves. *Cold*: nothing in the state directory. *Index cached*: obdelta
has built another delta from this base before; the target is new to it. Seconds are the median of {repeats} runs, save for the
longest pairs, which were run once; files were in the page cache for both. The load average was {load:.1f} (median over the
pairs; {cores} cores): of that, a busy server and its workers are about 2, and what is above slows obdelta more than the peer, for
its workers are niced.

Every delta counted here was proven three times over: by obdelta itself before it was served, and by Debian's `rdiff patch` on
the builder's layers and again on those that the server delivered; each time the sha256 was the target's diff_id.

![Bytes per pair](benchmarks.png)
"""


def write(
    results: Sequence[Result],
    repeats: int,
    batches: Sequence[v2.Result] = (),
    common: Sequence[releases.Result] = (),
) -> None:
    """Writes the page (not the plot). ``batches``: what was measured of v2; ``common``: of the commonest releases."""
    counted = [result for result in results if result.counted]
    parts = [
        _TOP.format(
            date=datetime.datetime.now(datetime.UTC).date(),
            version=obdelta.__version__,
            machine=_machine(),
            repeats=repeats,
            load=statistics.median(result.load for result in results),
            cores=len(os.sched_getaffinity(0)),
        ),
        "## The goals\n\n" + _goals(results, counted),
        "## Bytes\n\n" + _bytes(results, counted),
        "## The commonest releases\n\n" + releases.section(common, _table),
        "## Time\n\n" + _time(results, counted),
        "## What devices have to apply\n\n" + _commands(results),
        "## Memory\n\n" + _memory(results),
        "## Where the builder's time goes\n\n" + _stages(results),
        "## v2: rsync batches\n\n" + v2.section(batches, _table),
        "## The pairs\n\n" + _pairs(results),
    ]
    PAGE.write_text("\n".join(parts), "utf-8")


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    rdiff = subprocess.run(["rdiff", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"Python {python}, {cores} cores of {model}, {memory:.0f} GiB of memory, {rdiff}"


def _goals(results: Sequence[Result], counted: Sequence[Result]) -> str:
    largest = max(results, key=lambda result: result.base_bytes + result.target_bytes)
    worst = max(counted, key=lambda result: result.ratio("balanced"))
    figures = [
        (
            "delta bytes, geometric mean, `balanced`",
            _mean(counted, lambda r: r.ratio("balanced")),
            0.50,
            "of the peer's",
        ),
        (f"delta bytes, worst pair ({worst.name}), `balanced`", worst.ratio("balanced"), 0.85, "of the peer's"),
        ("delta bytes, geometric mean, `small`", _mean(counted, lambda r: r.ratio("small")), 0.45, "of the peer's"),
        ("wall time cold, geometric mean", _mean(counted, lambda r: r.cold), 0.70, "of the peer's"),
        (
            "wall time with the base's index cached, geometric mean",
            _mean(counted, lambda r: r.indexed),
            0.40,
            "of the peer's",
        ),
        (f"peak memory of the worker, {largest.name}", largest.served.worker_peak / MB, 600, "MB"),
    ]
    rows = [
        (
            what,
            f"{value:.2f}" if goal < 1 else f"{value:.0f}",
            f"≤ {goal:.2f}" if goal < 1 else f"≤ {goal}",
            unit,
            _met(value, goal),
        )
        for what, value, goal, unit in figures
    ]
    return _table(("figure", "measured", "goal", "", ""), rows)


def _met(value: float, goal: float) -> str:
    return "met" if value <= goal else "**not met**"


def _mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return geometric_mean(of(result) for result in results)


def _each(result: Result, form: str, of: Callable[[Figures], object]) -> list[str]:
    """A cell an effort; a dash where it was not run."""
    return [form.format(of(result.efforts[effort])) if effort in result.efforts else "–" for effort in EFFORTS]


def _bytes(results: Sequence[Result], counted: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            f"{r.full:,}",
            f"{r.peer.size:,}",
            *_each(r, "{:,}", lambda f: f.size),
            *(f"{r.ratio(effort):.3f}" if effort in r.efforts else "–" for effort in EFFORTS),
            *(f"{size:,}" if size is not None else "–" for size in (r.bounds.zstd, r.bounds.bsdiff)),
        )
        for r in results
    ]
    means = (f"**{geometric_mean(r.ratio(effort) for r in counted):.3f}**" for effort in EFFORTS)
    rows.append(("**geometric mean**", "", "", *("" for _ in EFFORTS), *means, "", ""))
    heads = ("pair", "full update", "peer", *EFFORTS, *(f"{e} ÷ peer" for e in EFFORTS), "zstd", "bsdiff")
    reasons = sorted({f"{r.name} ({r.bounds.why})" for r in results if r.bounds.why})
    notes = (
        "Bytes of compressed layers that travel. `full update`: the layers that differ, as the registry holds them. `zstd`"
        " (`--patch-from -19 --long=31`) and `bsdiff` are bounds: what formats could do that devices do not read; layers that the"
        " base holds whole count nothing there.\n"
    )
    if reasons:
        notes += f"A dash: not run: {', '.join(reasons)}.\n"
    if names := ", ".join(result.name for result in results if not result.counted):
        notes += f"Geometric means leave out: {names} (there for its memory).\n"
    return _table(heads, rows) + "\n" + notes


def _time(results: Sequence[Result], counted: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            f"{r.base_bytes / MB:.0f}",
            f"{r.target_bytes / MB:.0f}",
            f"{r.peer.signature:.1f} + {r.peer.delta:.1f} + {r.peer.gzip:.1f}",
            f"{r.peer.seconds:.2f}",
            f"{r.served.cold:.2f}",
            f"{r.cold:.2f}",
            f"{r.served.indexed:.2f}",
            f"{r.indexed:.2f}",
            *_each(r, "{:.2f}", lambda f: f.seconds),
            f"{r.peer.cpu:.1f}",
            f"{r.efforts['balanced'].cpu:.1f}",
        )
        for r in results
    ]
    means = f"**{_mean(counted, lambda r: r.cold):.2f}**", f"**{_mean(counted, lambda r: r.indexed):.2f}**"
    rows.append(("**geometric mean**", "", "", "", "", "", means[0], "", means[1], *("" for _ in EFFORTS), "", ""))
    heads = (
        "pair", "base MB", "target MB", "peer: sig + delta + gzip", "peer s", "cold s", "÷ peer", "index cached s", "÷ peer",
        *(f"{effort}, builder alone s" for effort in EFFORTS), "peer, processor s", "balanced, builder alone, processor s",
    )  # fmt: skip
    note = (
        "MB are uncompressed; the target's count from the first layer that differs. Processor seconds are summed over cores;"
        " other work on the machine changes them less than it changes wall time.\n"
    )
    return _table(heads, rows) + "\n" + note


def _commands(results: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            *_each(r, "{}", lambda f: f"{f.copies_per_mb:.0f} ({f.small_copies / max(f.copies, 1):.0%})"),
            *_each(r, "{:.2f}", lambda f: f.literal_bytes / MB),
            f"{r.peer.patch:.2f}",
            *_each(r, "{:.2f}", lambda f: f.patch),
        )
        for r in results
    ]
    heads = (
        "pair",
        *(f"{e}: copies per MB (small)" for e in EFFORTS),
        *(f"{e}: literal MB" for e in EFFORTS),
        *(f"{who}: s to patch" for who in ("peer", *EFFORTS)),
    )
    note = (
        "Copies for each 2^20 bytes of target; in brackets the share that is shorter than 64 bytes. A copy costs a device time"
        " (an open, a seek and a read in its store), so efforts bound their number. Seconds are those of `rdiff patch` here.\n"
    )
    return _table(heads, rows) + "\n" + note


def _memory(results: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            f"{(r.base_bytes) / MB:.0f}",
            f"{r.served.worker_peak / MB:.0f}",
            f"{r.served.worker_anonymous / MB:.0f}",
            f"{r.served.proxy_peak / MB:.0f}",
        )
        for r in results
    ]
    heads = (
        "pair",
        "base MB",
        "worker, peak resident MB",
        "of it without mapped files MB",
        "proxy process, peak resident MB",
    )
    note = (
        "Resident memory counts pages of mapped layer files, which the kernel takes back at will; the second column does not"
        " (sampled every 20 ms).\n"
    )
    return _table(heads, rows) + "\n" + note


def _stages(results: Sequence[Result]) -> str:
    stages = list(dict.fromkeys(stage for result in results for stage in result.efforts["balanced"].stages))
    rows = [
        (result.name, *(f"{result.efforts['balanced'].stages.get(stage, 0):.2f}" for stage in stages))
        for result in results
    ]
    note = "Seconds, `balanced`, cold, summed over layers; threads run side by side, so that sums can be more than wall time.\n"
    return _table(("pair", *stages), rows) + "\n" + note


def _pairs(results: Sequence[Result]) -> str:
    lines = [f"- **{result.name}**: {result.kind}. {'; '.join(result.changes)}." for result in results]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in heads[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows))
