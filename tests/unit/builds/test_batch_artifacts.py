"""Artifacts of v2 batches in the registry, which anyone who may push there can forge."""

from __future__ import annotations

import pytest

from obdelta.builds.publish.batch_publisher import _row, batch_manifest
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaKey, DeltaRow

SIZE = 100
KEY = DeltaKey("v2", 1, Digest("aa" * 32), Digest("bb" * 32))


@pytest.mark.parametrize(
    ("tail", "accepted"), [(0, True), (SIZE - 2, True), (SIZE - 1, False), (SIZE, False)]
)
def test_the_tail_leaves_room_for_the_records_before_it(tail: int, accepted: bool) -> None:
    row = DeltaRow(
        KEY,
        base_repository="v2/a",
        target_repository="v2/b",
        tag=None,
        content=Digest("cc" * 32),
        full_bytes=0,
        delta_bytes=SIZE,
        seconds=0.0,
        created=0,
        details={"tail": tail, "sent_index": None},
    )
    found = _row(batch_manifest(row), KEY, "v2/b", 0)
    assert isinstance(found, DeltaRow) == accepted
    if not accepted:
        assert found == "its annotations are not readable"
