"""A process that builds the delta layers of one pair and reports the costs, instead of obdelta's
worker.

Reads a job (see :mod:`bench.direct`) as JSON on stdin, writes its figures as JSON on stdout.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from obdelta.delta.build import Effort, LayerFile, build_layer
from obdelta.delta.effort import DEFAULT_PRICES, command_prices
from obdelta.oci.digest import DiffID

METERED = command_prices(0)
_MEMORY = 3 << 30
"""Bytes; a build that needs more fails here instead of exhausting the machine."""


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    job = json.load(sys.stdin)
    base = [LayerFile(DiffID(hex), Path(path), size) for hex, path, size in job["base"]]
    held = {layer.diff_id for layer in base}
    layers = []
    started, started_cpu = time.monotonic(), time.process_time()
    for number, (hex, path, size) in enumerate(job["targets"]):
        target = DiffID(hex) if DiffID(hex) in held else LayerFile(DiffID(hex), Path(path), size)
        effort = Effort(job["effort"])
        made = build_layer(
            base,
            target,
            Path(job["out"]) / str(number),
            # The smallest delta is for a metered link.
            prices=METERED if effort is Effort.SMALL else DEFAULT_PRICES,
            effort=effort,
            threads=job["threads"],
            index_dir=Path(job["index_dir"]) if job["index_dir"] else None,
            progress=None,
        )
        layers.append(
            {
                "size": made.size,
                "copies": made.copies,
                "small_copies": made.small_copies,
                "literal_bytes": made.literal_bytes,
                "seconds": dict(made.seconds),
            }
        )
    seconds, cpu = time.monotonic() - started, time.process_time() - started_cpu
    status = Path("/proc/self/status").read_text()
    peak = next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")
    )
    json.dump({"seconds": seconds, "cpu": cpu, "peak": peak, "layers": layers}, sys.stdout)


_main()
