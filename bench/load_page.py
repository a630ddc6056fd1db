"""Writes docs/load.md from the measurements of :mod:`bench.load`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.load import Load, Rate


def page(load: Load, rates: Sequence[Rate], began: float) -> str:
    """Returns docs/load.md. ``began``: the machine's load average at the start."""
    outcome, mib = load.outcome, 1 << 20
    lines = [
        "# Load",
        "",
        "`make bench-load` writes this page; do not edit it.",
        (
            f"It was measured on {time.strftime('%Y-%m-%d', time.gmtime())} with"
            f" {len(os.sched_getaffinity(0))} cores for server, registry and clients together (load"
            f" average at the start: {began:.1f})."
        ),
        "",
        "## A fleet at once",
        "",
        "All devices start at the same moment, before the delta exists.",
        (
            "Each one asks `/api/v3/delta` and pulls the image that the answer names, as"
            " balena-engine does."
        ),
        (
            "A device requests ping, manifest, config and layers one after another, each over a new"
            " TLS connection."
        ),
        "Each device has its own token and compares every digest.",
        "The upstream is Debian's `docker-registry`.",
        "",
        "| figure | value |",
        "|---|---:|",
        f"| devices | {load.devices:,} |",
        f"| verified | {outcome.verified:,} |",
        f"| delta | {load.delta_bytes:,} bytes |",
        f"| builds | {load.builds} |",
        f"| answers 502 or 504 (retried) | {outcome.retried:,} |",
        (
            "| layers resumed, and pulls restarted, after a dropped connection |"
            f" {outcome.resumed:,}, {outcome.pulled_again:,} |"
        ),
        f"| bytes delivered | {outcome.bytes:,} |",
        f"| seconds | {outcome.seconds:.0f} |",
        f"| bytes per second | {outcome.bytes / outcome.seconds / 1e6:,.0f} MB |",
        *(
            f"| peak resident memory, process {number} of {load.processes} | {peak / mib:,.0f}"
            " MiB |"
            for number, peak in enumerate(load.peaks, 1)
        ),
        "",
        "## Beside nginx",
        "",
        (
            "Both servers deliver the delta's large layer: obdelta with `processes ="
            f" {load.processes}`, and Debian's nginx."
        ),
        "nginx has as many processes, `sendfile on`, the same certificate, and TLS 1.3.",
        (
            "The client is Debian's `wrk` with one thread on the same cores; the two servers take"
            " turns."
        ),
        "MB are 10^6 bytes.",
        "",
        (
            "| connections | nginx MB/s | obdelta MB/s | ratio | nginx MB per processor second |"
            " obdelta | ratio |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for keep in (True, False):
        some = [rate for rate in rates if rate.keep_alive is keep]
        if not some:
            continue
        nginx, ours, their_cpu, our_cpu = (
            statistics.median(getattr(rate, name) for rate in some)
            for name in ("nginx", "obdelta", "nginx_cpu", "obdelta_cpu")
        )
        ratio = statistics.median(rate.obdelta / rate.nginx for rate in some)
        lines.append(
            f"| {'kept alive' if keep else 'a new one each'} | {nginx:,.0f} | {ours:,.0f} |"
            f" {ratio:.2f} | {their_cpu:,.0f} | {our_cpu:,.0f} | {our_cpu / their_cpu:.2f} |"
        )
    lines += [
        "",
        f"Each server was measured {len(rates) // 2} times, in turn.",
        (
            f"Values are medians; the ratio is the median of the {len(rates) // 2} ratios, not the"
            " ratio of the medians."
        ),
    ]
    return "\n".join(lines) + "\n"
