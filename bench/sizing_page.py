"""The generated part of docs/sizing.md: tables of simulated fleets, and what was measured."""

from __future__ import annotations

import os
import statistics
from dataclasses import replace

from bench.ready import SOURCES, WORKER_CORES, Run
from bench.results import table
from bench.simulation import Kind, Load, Outcome, makespan, quantile, simulate

BEGIN, END = "<!-- make bench-sizing writes this part -->", "<!-- end of make bench-sizing -->"
WORKERS = (1, 2, 4, 8)
RATES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Releases a minute."""
DEVICES = (1_000, 10_000, 100_000, 1_000_000)
READY_GOAL = 120.0
"""Seconds in which 95 % of the releases should have all of their deltas."""
BUSY_GOAL = 0.7
"""Share of their time that workers should be busy at most, for what the model does not know."""
MIB, MB = 1 << 20, 1e6
PULLING, WAITING = 150 << 10, 15 << 10
"""Bytes of memory for a device that pulls, and for one that waits (docs/load.md, and the page)."""


def part(pairs: list[Kind], rate: float, runs: list[Run]) -> str:
    """Returns the generated part of docs/sizing.md."""
    load = Load()
    return "\n".join(
        [
            BEGIN,
            *(_measured(runs) if runs else []),
            *_assumptions(load, pairs),
            *_by_workers(load, pairs),
            *_by_rate(load, pairs, rate),
            *_by_devices(load, pairs),
            END,
        ]
    )


def _measured(runs: list[Run]) -> list[str]:
    alone = runs[0]
    limited = next((run for run in runs if run.workers), alone)
    rows = [
        (
            f"{run.workers}, each {WORKER_CORES:g} of a core" if run.workers else "none",
            str(run.builds),
            f"{run.seconds:.0f}",
            f"{run.per_hour:,.0f}",
            f"{makespan((limited if run.workers else alone).each, run.builds):.0f}",
            f"{run.load:.1f}",
        )
        for run in runs
    ]
    cores = len(os.sched_getaffinity(0))
    return [
        "",
        "### Builds an hour, measured",
        "",
        (
            f"Deltas from {SOURCES} older releases to a new one were prepared together, on"
            f" {cores} cores."
        ),
        "Registry, server, workers and builds shared them.",
        (
            f"Each worker builds one delta at a time, and may use {WORKER_CORES:g} of a core: so"
            " four workers on this machine stand for four small ones."
        ),
        (
            "The deltas are small: a build takes"
            f" {statistics.median(alone.each):.2f} s in the server, and"
            f" {statistics.median(limited.each):.2f} s in a worker (medians, one at a time)."
        ),
        "",
        table(
            (
                "workers",
                "builds at a time",
                "s from the release to all ready",
                "builds an hour",
                "s by the model",
                "load average before",
            ),
            rows,
        ),
        *(
            [
                "Other programs were busy on this machine, so a quiet one is faster.",
                "Rows with another load average cannot be compared with each other.",
            ]
            if min(run.load for run in runs) > cores
            else []
        ),
        (
            "The model takes the times of the builds one at a time, and runs as many builds at a"
            " time as each row says."
        ),
        f"It is too optimistic for builds in the server, which share the same {cores} cores.",
        (
            "So in the rest of this section, a worker is a machine of two cores that builds one"
            " delta at a time."
        ),
    ]


def _assumptions(load: Load, pairs: list[Kind]) -> list[str]:
    cold = statistics.fmean(pair.cold for pair in pairs)
    warm = statistics.fmean(pair.indexed for pair in pairs)
    size = statistics.fmean(pair.delta_bytes for pair in pairs)
    return [
        "",
        "### The model",
        "",
        (
            f"{load.devices:,} devices in {load.fleets:,} fleets update for {load.hours:g} hours"
            " (`bench/simulation.py`)."
        ),
        "",
        (
            "- **Fleets** differ in size: the largest fleet has about 13,000 devices, and half of"
            " the fleets have fewer than 30."
        ),
        "- **Releases** arrive at random (a Poisson process), in any fleet with the same chance.",
        "  Each changes one to three images.",
        (
            f"- **Versions**: {load.behind:.0%} of a fleet are behind the newest version,"
            f" {load.behind:.0%} of those behind the one before, and so on."
        ),
        "  Each version in the field needs a delta of each image.",
        (
            f"- **Builds** are the {len(pairs)} pairs of the [benchmarks](benchmarks.md), all"
            " equally often."
        ),
        (
            f"  A build takes {cold:.1f} s on average, or {warm:.1f} s with the base's index"
            f" cached, as {load.indexed:.0%} of the builds find it."
        ),
        f"  A delta has {size / MB:.1f} MB on average.",
        (
            f"- **Devices** learn of a release within {load.poll / 60:g} minutes, and pull at"
            f" {load.link / MB * 8:g} Mbit/s."
        ),
        "",
        "Left out: the registry's speed, retries, failed builds, v2, and hours of the day.",
    ]


def _by_workers(load: Load, pairs: list[Kind]) -> list[str]:
    rows = []
    for workers in WORKERS:
        found = simulate(load, pairs, workers)
        rows.append(
            (
                str(workers),
                f"{found.busy:.0%}",
                f"{found.longest_queue}",
                *(f"{quantile(found.ready, share):.0f}" for share in (0.5, 0.95, 1.0)),
                f"{len(found.waits) / found.updates:.1%}",
                f"{quantile(found.waits, 0.95):.0f}",
            )
        )
    return [
        "",
        "### One release a minute",
        "",
        (
            f"{found.releases:,} releases need {found.builds:,} deltas;"
            f" {found.updates:,} devices update."
        ),
        "",
        table(
            (
                "workers",
                "busy",
                "longest queue",
                "s to all ready: median",
                "95 %",
                "longest",
                "devices that wait",
                "s that they wait, 95 %",
            ),
            rows,
        ),
    ]


def enough(load: Load, pairs: list[Kind], most: int = 256) -> tuple[int, Outcome]:
    """Returns the fewest workers that keep up with a load, and the outcome with them."""
    fewest = int(simulate(load, pairs, most, builds_only=True).busy * most / BUSY_GOAL)
    for workers in range(max(1, fewest), most + 1):
        found = simulate(load, pairs, workers, builds_only=True)
        if found.busy <= BUSY_GOAL and quantile(found.ready, 0.95) <= READY_GOAL:
            return workers, simulate(load, pairs, workers)
    raise ValueError(f"{most} workers are too few")


def _by_rate(load: Load, pairs: list[Kind], rate: float) -> list[str]:
    rows = []
    for per_minute in RATES:
        some = replace(load, releases_per_minute=per_minute, hours=4.0)
        workers, found = enough(some, pairs)
        rows.append(
            (
                f"{per_minute:g}",
                f"{found.builds / some.hours:,.0f}",
                str(workers),
                f"{found.busy:.0%}",
                f"{found.mean_bytes / MB:,.0f}",
                f"{found.peak_bytes / MB:,.0f}",
                str(-int(-found.peak_bytes // rate)),
            )
        )
    alone = simulate(load, pairs, 1)
    saturated = load.releases_per_minute / alone.busy
    return [
        f"One worker saturates at {saturated:.1f} releases a minute,"
        f" {3600 / (alone.busy * load.hours * 3600 / alone.builds):,.0f} builds an hour;"
        " n workers at n times as many.",
        "",
        "### More releases",
        "",
        (
            f"`workers` is the smallest number with which 95 % of the releases are ready in"
            f" {READY_GOAL:g} s, and workers are busy for at most {BUSY_GOAL:.0%} of the time."
        ),
        (
            f"A frontend is a machine of two cores that sends {rate / MB:,.0f} MB/s over TLS"
            " ([measured](load.md))."
        ),
        "With `publish = registry` the registry sends the layers, and two frontends are enough.",
        "",
        table(
            (
                "releases a minute",
                "builds an hour",
                "workers",
                "busy",
                "MB/s to devices: mean",
                "busiest minute",
                "frontends (publish = serve)",
            ),
            rows,
        ),
        (
            "The network saturates before the workers do: the busiest minute is when one of the"
            " largest fleets updates."
        ),
    ]


def _by_devices(load: Load, pairs: list[Kind]) -> list[str]:
    rows = []
    for devices in DEVICES:
        share = devices / load.devices
        some = replace(
            load,
            devices=devices,
            fleets=max(1, int(load.fleets * share)),
            releases_per_minute=load.releases_per_minute * share,
            hours=24.0 if share > 0.01 else 240.0,
        )
        workers, found = enough(some, pairs)
        days = some.hours / 24
        month = 30 * found.builds / days * statistics.fmean(pair.delta_bytes for pair in pairs)
        memory = found.peak_devices * PULLING + len(found.waits) / max(1, found.releases) * WAITING
        rows.append(
            (
                f"{devices:,}",
                f"{found.builds / days:,.0f}",
                str(workers),
                f"{found.peak_devices:,.0f}",
                f"{60 + memory / MIB:,.0f}",
                f"{month / 1e9:,.0f}",
            )
        )
    return [
        "",
        "### Memory and disk by devices",
        "",
        (
            "The number of fleets grows with the devices: each fleet has 100 devices and 0.14"
            " releases a day."
        ),
        "Memory is that of one frontend that serves everything, without builds.",
        "Disk is what all deltas of 30 days take in one form, if nothing is evicted.",
        "",
        table(
            (
                "devices",
                "builds a day",
                "workers",
                "devices that pull at once",
                "memory, MiB",
                "deltas of a month, GB",
            ),
            rows,
        ),
    ]


def written(page: str, generated: str) -> str:
    """Returns the page with its generated part replaced."""
    return page[: page.index(BEGIN)] + generated + page[page.index(END) + len(END) :]
