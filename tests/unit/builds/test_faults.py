"""A finished layer that shows a fault in the search is counted, and its pair is logged."""

from __future__ import annotations

from typing import Any, cast

from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import implementer

from obdelta.builds.native_v3 import NativeV3
from obdelta.builds.types import Pair
from obdelta.observability import Metrics


def test_faults_are_counted_and_name_their_pair() -> None:
    builder = NativeV3.__new__(NativeV3)
    builder._metrics = Metrics()
    pair = cast(Pair, "fleet/app from one to two")
    seen: list[str] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event["log_namespace"].startswith("obdelta.builds.native_v3"):
            seen.append(f"{event['log_level'].name} {formatEvent(event)}")

    def layer(**values: int) -> dict[str, Any]:
        return {"target": "sha256:aa", "size": 1000, "excess": 0, "lost": 0, **values}

    globalLogPublisher.addObserver(observe)
    try:
        builder._check(pair, [layer(), layer()])
        assert seen == []
        builder._check(pair, [layer(), layer(excess=700), layer(lost=30)])
    finally:
        globalLogPublisher.removeObserver(observe)
    assert seen == [
        (
            "warn delta larger than expected: layer sha256:aa of fleet/app from one to two has 1000"
            " bytes, 700 more than its changed entries account for: please report the pair"
        ),
        (
            "error plan replaced: layer sha256:aa of fleet/app from one to two lost 30 known bytes:"
            " please report the pair"
        ),
    ]
    counted = builder._metrics.delta_faults
    assert [counted.labels(fault)._value.get() for fault in ("oversized", "known-bytes")] == [1, 1]
