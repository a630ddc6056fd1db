"""One pair's figures, as they are measured and as they are kept in ``.bench/results.json``."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.corpus import CACHE
from bench.direct import Figures
from bench.peer import Bounds, Peer
from bench.served import Served

EFFORTS = ("fast", "balanced", "small")
PATH = CACHE / "results.json"


@dataclass(frozen=True, slots=True)
class Result:
    """All measurements of one pair.

    ``full``: bytes of a full update, the compressed layers that differ. ``efforts``: the builder
    alone, by effort (pairs that are not counted: ``balanced`` only). ``served``: the running
    server at effort ``balanced``. ``load``: the machine's load average (one minute) when the
    pair's turn ended.
    """

    name: str
    kind: str
    counted: bool
    changes: list[str]
    base_bytes: int
    target_bytes: int
    full: int
    peer: Peer
    bounds: Bounds
    efforts: dict[str, Figures]
    served: Served
    load: float

    @property
    def cold(self) -> float:
        """Request to manifest with an empty state, as a share of open-balena-delta's seconds."""
        return self.served.cold / self.peer.seconds

    @property
    def indexed(self) -> float:
        """Request to manifest with the base's index cached, as a share of open-balena-delta's
        seconds.
        """
        return self.served.indexed / self.peer.seconds

    def ratio(self, effort: str) -> float:
        """Delta bytes as a share of open-balena-delta's."""
        return self.efforts[effort].size / self.peer.size


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. The first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in heads[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows))


def save(results: Sequence[Result], path: Path = PATH) -> None:
    """Saves the results, so that the page can be written again without another run."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1))


def load(path: Path = PATH) -> list[Result]:
    """Returns the results that :func:`save` wrote."""
    return [_result(fields) for fields in json.loads(path.read_bytes())]


def _result(fields: dict[str, Any]) -> Result:
    efforts = {effort: Figures(**figures) for effort, figures in fields.pop("efforts").items()}
    peer, bounds, served = (
        Peer(**fields.pop("peer")),
        Bounds(**fields.pop("bounds")),
        Served(**fields.pop("served")),
    )
    return Result(**fields, peer=peer, bounds=bounds, served=served, efforts=efforts)


def machine() -> str:
    """Returns one line about this machine, for pages with measurements."""
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
    rdiff = subprocess.run(
        ["rdiff", "--version"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[0]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"Python {python}, {cores} cores of {model}, {memory:.0f} GiB of memory, {rdiff}"
