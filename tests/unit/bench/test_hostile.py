"""The hostile patterns have their promised properties: each is built or refused, as named here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.hostile import Cost, Kind, _prices, measure_here, patterns

V2 = (
    "ordinary",
    "entries_repeated_through_a_link",
    "sparse_pieces",
    "sparse_pieces_of_512_bytes",
    "holes",
    "tiny_gzip_members",
    "many_layers",
)
"""Patterns that run through rsync here: each costs the start of two processes."""
REFUSED = {
    ("v3", "tiny_gzip_members"),
    ("v2", "tiny_gzip_members"),
    ("v3", "tiny_zstd_frames"),
    ("v2", "sparse_pieces"),
}
"""Patterns of more and smaller pieces than a writer makes."""


@pytest.mark.parametrize(
    ("kind", "name"), [*(("v3", name) for name in patterns()), *(("v2", name) for name in V2)]
)
def test_patterns_are_built(kind: Kind, name: str, tmp_path: Path) -> None:
    cost = measure_here(name, kind, 60_000, tmp_path)
    assert cost.seconds > 0 and cost.mb > 0
    assert bool(cost.refused) == ((kind, name) in REFUSED), cost.refused


def test_prices_distinguish_bytes_and_entries() -> None:
    mb, entry = _prices(Cost(10.1, 100.0, 100), Cost(1.5, 5.0, 1000))
    assert (round(mb, 6), round(entry, 6)) == (0.1, 0.001)
