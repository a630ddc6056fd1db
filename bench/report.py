"""``docs/benchmarks.md``: the measured figures in words and tables."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Sequence

import obdelta
from bench import releases, v2
from bench.corpus import CACHE
from bench.direct import Figures
from bench.results import EFFORTS, Result, geometric_mean, machine, table

DOCS = CACHE.parent / "docs"
PAGE, PLOT = DOCS / "benchmarks.md", DOCS / "benchmarks.png"
MB = 10**6
"""Units of memory and of times; copies are counted for each 2^20 bytes of target."""

_TOP = """\
# Benchmarks

`make bench` writes this page; do not edit it.
It was measured on {date} with obdelta {version}, {machine}.

## Method

Each pair is two releases of an image.
The images consist of published packages in two versions, and are in a real registry (Debian's \
`docker-registry`) on loopback.

**rdiff** stands for balena-engine's own delta builder.
For each layer, beginning with the first one that differs, `rdiff -b 512 -S 32` makes a delta from \
the concatenated base layers, and `gzip -6` compresses it.
The sizes differ from those of balena-engine's builder by at most 3 %.
rdiff runs on the same layers, uncompressed on disk, in the same run as obdelta.
rdiff's time is the sum of signature, delta and gzip, which run one after the other on one core.

**obdelta** uses all cores.
obdelta's time goes from the request to the published manifest.
It includes fetching the images from the registry, inflating, hashing, matching, deflating and \
proving.

- *Cold*: the state directory is empty.
- *Index cached*: obdelta has built another delta from this base before, but does not know the \
target.

`fast` and `balanced` have the default `device-link` (0.5 Mbit/s).
A command must save the bytes that its time on the device is worth, so these deltas have fewer \
commands and more bytes.
`small` has `device-link = metered`, where only bytes count.
See [Update time](update-time.md).

Seconds are the median of {repeats} runs; the longest pairs were run once.
For both programs the files were in the page cache.
The load average was {load:.1f} (median over the pairs; {cores} cores).
obdelta's server and worker processes themselves cause a load of up to 2.
Other load slows obdelta more than rdiff, because obdelta's worker processes have a low priority.

Every delta was proven three times: by obdelta before serving, by Debian's `rdiff patch` on the \
layers as built, and by `rdiff patch` on the layers as served.
All three times, the sha256 of the result was the target's diff_id.

![Bytes per pair](benchmarks.png)
"""


def write(
    results: Sequence[Result],
    repeats: int,
    batches: Sequence[v2.Result] = (),
    common: Sequence[releases.Result] = (),
) -> None:
    """Writes the page (not the plot). ``batches``: the measurements of v2; ``common``: of the
    commonest releases.
    """
    counted = [result for result in results if result.counted]
    parts = [
        _TOP.format(
            date=datetime.datetime.now(datetime.UTC).date(),
            version=obdelta.__version__,
            machine=machine(),
            repeats=repeats,
            load=statistics.median(result.load for result in results),
            cores=len(os.sched_getaffinity(0)),
        ),
        "## The goals\n\n" + _goals(results, counted),
        "## Bytes\n\n" + _bytes(results, counted),
        "## The commonest releases\n\n" + releases.section(common),
        "## Time\n\n" + _time(results, counted),
        "## What devices have to apply\n\n" + _commands(results),
        "## Memory\n\n" + _memory(results),
        "## Where the builder's time goes\n\n" + _stages(results),
        "## v2: rsync batches\n\n" + v2.section(batches),
        "## The pairs\n\n" + _pairs(results),
    ]
    PAGE.write_text("\n".join(parts), "utf-8")


def _goals(results: Sequence[Result], counted: Sequence[Result]) -> str:
    largest = max(results, key=lambda result: result.base_bytes + result.target_bytes)
    worst = max(counted, key=lambda result: result.ratio("balanced"))
    figures = [
        (
            "delta bytes, geometric mean, `balanced`",
            _mean(counted, lambda r: r.ratio("balanced")),
            0.50,
            "of rdiff's",
        ),
        (
            f"delta bytes, worst pair ({worst.name}), `balanced`",
            worst.ratio("balanced"),
            0.85,
            "of rdiff's",
        ),
        (
            "delta bytes, geometric mean, `small` and `metered`",
            _mean(counted, lambda r: r.ratio("small")),
            0.45,
            "of rdiff's",
        ),
        ("wall time cold, geometric mean", _mean(counted, lambda r: r.cold), 0.70, "of rdiff's"),
        (
            "wall time with the base's index cached, geometric mean",
            _mean(counted, lambda r: r.indexed),
            0.40,
            "of rdiff's",
        ),
        (
            f"peak memory of the worker process, {largest.name}",
            largest.served.worker_peak / MB,
            600,
            "MB",
        ),
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
    return table(("figure", "measured", "goal", "unit", "verdict"), rows)


def _met(value: float, goal: float) -> str:
    return "met" if value <= goal else "**not met**"


def _mean(results: Sequence[Result], of: Callable[[Result], float]) -> float:
    return geometric_mean(of(result) for result in results)


def _each(result: Result, form: str, of: Callable[[Figures], object]) -> list[str]:
    """Returns a cell for each effort; a dash if it was not run."""
    return [
        form.format(of(result.efforts[effort])) if effort in result.efforts else "–"
        for effort in EFFORTS
    ]


def _bytes(results: Sequence[Result], counted: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            f"{r.full:,}",
            f"{r.peer.size:,}",
            *_each(r, "{:,}", lambda f: f.size),
            *(f"{r.ratio(effort):.3f}" if effort in r.efforts else "–" for effort in EFFORTS),
            *(
                f"{size:,}" if size is not None else "–"
                for size in (r.bounds.zstd, r.bounds.bsdiff)
            ),
        )
        for r in results
    ]
    means = (f"**{geometric_mean(r.ratio(effort) for r in counted):.3f}**" for effort in EFFORTS)
    rows.append(("**geometric mean**", "", "", *("" for _ in EFFORTS), *means, "", ""))
    heads = (
        "pair",
        "full update",
        "rdiff",
        *EFFORTS,
        *(f"{e} ÷ rdiff" for e in EFFORTS),
        "zstd",
        "bsdiff",
    )
    reasons = sorted({r.bounds.why for r in results if r.bounds.why})
    notes = (
        "The table shows bytes of compressed layers that are transferred.\n"
        "`full update`: the layers that differ, as the registry holds them.\n"
        "`zstd` (`--patch-from -19 --long=31`) and `bsdiff` show what other formats could do;"
        " devices do not read them.\n"
        "For `zstd` and `bsdiff`, layers that the base has too count as 0 bytes.\n"
    )
    for why in reasons:
        names = ", ".join(result.name for result in results if result.bounds.why == why)
        notes += f"A dash means not run, here {why}: {names}.\n"
    if names := ", ".join(result.name for result in results if not result.counted):
        notes += f"Geometric means leave out: {names} (a test of memory).\n"
    return table(heads, rows) + "\n" + notes


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
    means = (
        f"**{_mean(counted, lambda r: r.cold):.2f}**",
        f"**{_mean(counted, lambda r: r.indexed):.2f}**",
    )
    rows.append(
        (
            "**geometric mean**",
            "",
            "",
            "",
            "",
            "",
            means[0],
            "",
            means[1],
            *("" for _ in EFFORTS),
            "",
            "",
        )
    )
    heads = (
        "pair",
        "base MB",
        "target MB",
        "rdiff: sig + delta + gzip",
        "rdiff s",
        "cold s",
        "÷ rdiff",
        "index cached s",
        "÷ rdiff",
        *(f"{effort}, builder alone s" for effort in EFFORTS),
        "rdiff, processor s",
        "balanced, builder alone, processor s",
    )
    note = (
        "Sizes in MB are uncompressed; for the target, they begin with the first layer that"
        " differs.\n"
        "Processor seconds are summed over cores; other work on the machine changes them less than"
        " wall time.\n"
    )
    return table(heads, rows) + "\n" + note


def _commands(results: Sequence[Result]) -> str:
    rows = [
        (
            r.name,
            *_each(
                r,
                "{}",
                lambda f: f"{f.copies_per_mb:.0f} ({f.small_copies / max(f.copies, 1):.0%})",
            ),
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
        *(f"{who}: s to patch" for who in ("rdiff", *EFFORTS)),
    )
    note = (
        "Copies are counted for each 2^20 bytes of target; in brackets is the share shorter than 64"
        " bytes.\n"
        "Each copy takes time on the device (an open, a seek and a read in its store), so a"
        " price for each command (`device-link`) limits their number.\n"
        "Seconds are those of `rdiff patch` on the machine of the benchmark.\n"
    )
    return table(heads, rows) + "\n" + note


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
        "worker process, peak resident MB",
        "without mapped files MB",
        "server process, peak resident MB",
    )
    note = (
        "Resident memory includes pages of mapped layer files, which the kernel can reclaim at any"
        " time.\n"
        'The column "without mapped files" leaves them out (sampled every 20 ms).\n'
    )
    return table(heads, rows) + "\n" + note


def _stages(results: Sequence[Result]) -> str:
    stages = list(
        dict.fromkeys(stage for result in results for stage in result.efforts["balanced"].stages)
    )
    rows = [
        (
            result.name,
            *(f"{result.efforts['balanced'].stages.get(stage, 0):.2f}" for stage in stages),
        )
        for result in results
    ]
    note = (
        "The table shows seconds of a cold build with `balanced`, summed over layers.\n"
        "Threads run in parallel, so sums can exceed the wall time.\n"
    )
    return table(("pair", *stages), rows) + "\n" + note


def _pairs(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        lines.append(f"- **{result.name}**: {result.kind}.")
        lines += [f"  - `{change}`" for change in result.changes]
    return "\n".join(lines) + "\n"
