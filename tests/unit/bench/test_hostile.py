"""The hostile patterns are what they say: each is built, small, and none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.hostile import Cost, Kind, _prices, measure_here, patterns

V2 = (
    "ordinary",
    "again_through_a_link",
    "sparse_pieces",
    "holes",
    "tiny_gzip_members",
    "many_layers",
)
"""Those that go through rsync here: each costs the start of two processes."""


@pytest.mark.parametrize(
    ("kind", "name"), [*(("v3", name) for name in patterns()), *(("v2", name) for name in V2)]
)
def test_patterns_are_built(kind: Kind, name: str, tmp_path: Path) -> None:
    cost = measure_here(name, kind, 60_000, tmp_path)
    assert cost.seconds > 0 and cost.mb > 0
    assert not cost.refused


def test_prices_tell_bytes_and_entries_apart() -> None:
    mb, entry = _prices(Cost(10.1, 100.0, 100), Cost(1.5, 5.0, 1000))
    assert (round(mb, 6), round(entry, 6)) == (0.1, 0.001)
