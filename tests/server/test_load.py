"""A small herd, with complete updates: ``make bench-load`` does the same with 2,000 devices and 30
MB (docs/load.md).
"""

from __future__ import annotations

from pathlib import Path

from bench.load import fleet

DEVICES, SIZE = 200, 5 << 20


def test_many_devices_are_served_by_two_processes(tmp_path: Path) -> None:
    load = fleet(tmp_path, devices=DEVICES, size=SIZE, processes=2, seconds=200)
    assert (load.outcome.verified, load.outcome.errors) == (DEVICES, {})
    assert load.builds == 1
    (name,) = load.outcome.names
    assert ":delta-" in name
    assert load.outcome.bytes > DEVICES * SIZE
    assert len(load.peaks) == 2
    assert max(load.peaks) <= 300 << 20
