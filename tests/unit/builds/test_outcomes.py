"""Outcomes of builds as text in Redis."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.builds.publish.delta_tags import delta_tag
from obdelta.builds.replicas import outcomes
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Outcome

KEY = DeltaKey("v3", 7, Digest.of(b"base"), Digest.of(b"target"))
ROW = DeltaRow(KEY, "v2/a", "v2/b", delta_tag(KEY), Digest.of(b"c"), 100, 10, 1.5, 5)


def changed(**changes: object) -> bytes:
    """Returns a finished delta as a replica writes it, with these values replaced."""
    return json.dumps(json.loads(outcomes.text_of_row(ROW)) | changes).encode()


def verdict(outcome: object, reason: object) -> bytes:
    return json.dumps({"format": 1, "outcome": outcome, "reason": reason}).encode()


def test_outcomes_are_read_as_they_were_written() -> None:
    text = outcomes.text_of_row(replace(ROW, details={"layers": [{"n": 1}] * 10_000})).encode()
    assert outcomes.read(text, KEY) == ROW and len(text) < 1000
    assert outcomes.read(text, DeltaKey("v3", 8, KEY.base, KEY.target)) is None
    written = outcomes.text_of_verdict(Outcome.TOO_LARGE, "why" * 10_000).encode()
    assert outcomes.read(written, KEY) == (Outcome.TOO_LARGE, ("why" * 10_000)[:500])


def test_a_reason_is_one_line_without_control_characters() -> None:
    found = outcomes.read(verdict("error", "a\nb\x1b[31mc\u202ed\u0085\ud800é"), KEY)
    assert found == (Outcome.ERROR, "a?b?[31mc?d??é")


NONSENSE: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'{"format": 2}',
    b'{"format": 1}',
    b"\xff\xfe",
    b'{"format": 1, "outcome": "\xc3"}',
    b"[" * 16_000,
    b'{"a":' * 3_000,
    b'{"format": 1, "outcome": ' + b"[" * 10_000,
    b"9" * 10_000,
    b'"' + b"x" * (1 << 20),
    verdict("?", "why"),
    verdict(None, "why"),
    verdict("error", None),
    verdict("error", ["why"]),
    verdict(["error"], "why"),
    changed(kind="v2"),
    changed(kind=["v3"]),
    changed(recipe=8),
    changed(recipe="7"),
    changed(recipe=True),
    changed(base="sha256:"),
    changed(target=str(KEY.base)),
    changed(content=None),
    changed(content=7),
    changed(base_repository="a\nb"),
    changed(base_repository=7),
    changed(target_repository="x" * 300),
    changed(tag=None),
    changed(tag="a b"),
    changed(tag="x" * 200),
    changed(tag={}),
    changed(full_bytes=-1),
    changed(full_bytes=10**30),
    changed(full_bytes=1.5),
    changed(full_bytes=True),
    changed(delta_bytes="1"),
    changed(seconds=float("nan")),
    changed(seconds=float("inf")),
    changed(seconds=10**400),
    changed(created=-5),
    changed(created=1e300),
    changed(seconds=True),
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_malformed_text_is_no_outcome(text: bytes) -> None:
    assert outcomes.read(text, KEY) is None


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text() | st.integers(), st.lists).map(
        lambda value: json.dumps({"format": 1, "outcome": value, "reason": value}).encode()
    )
)
def test_reading_any_text_raises_nothing(text: bytes) -> None:
    found = outcomes.read(text, KEY)
    assert found is None or isinstance(found, tuple)
