"""One pair's figures, as they are measured and as they are kept in ``.bench/results.json``."""

from __future__ import annotations

import json
import math
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
    """All that was measured over one pair. ``full`` are the bytes of a full update: the layers that
    differ, compressed.

    ``efforts`` holds the builder alone by effort (pairs that do not count: ``balanced`` only),
    ``served`` the running server at effort ``balanced``. ``load`` is the machine's load average
    (one minute) when the pair's turn ended.
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
        """Request to manifest with an empty state, as a share of the peer's seconds."""
        return self.served.cold / self.peer.seconds

    @property
    def indexed(self) -> float:
        """Request to manifest with the base's index cached, as a share of the peer's seconds."""
        return self.served.indexed / self.peer.seconds

    def ratio(self, effort: str) -> float:
        """Delta bytes as a share of the peer's."""
        return self.efforts[effort].size / self.peer.size


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def save(results: Sequence[Result], path: Path = PATH) -> None:
    """For another rendering without another run."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1))


def load(path: Path = PATH) -> list[Result]:
    """What :func:`save` wrote."""
    return [_result(fields) for fields in json.loads(path.read_bytes())]


def _result(fields: dict[str, Any]) -> Result:
    efforts = {effort: Figures(**figures) for effort, figures in fields.pop("efforts").items()}
    peer, bounds, served = (
        Peer(**fields.pop("peer")),
        Bounds(**fields.pop("bounds")),
        Served(**fields.pop("served")),
    )
    return Result(**fields, peer=peer, bounds=bounds, served=served, efforts=efforts)
