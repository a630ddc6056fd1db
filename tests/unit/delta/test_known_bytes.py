"""Bytes that are known to be equal are copied, wherever they are in a layer and whatever changed
before them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from obdelta.delta import planner
from obdelta.delta.build import Effort
from obdelta.delta.effort import TUNINGS, pricing
from obdelta.delta.kernel.binding import NONE, ffi, lib
from obdelta.oci import Form
from tests.support.delta import build
from tests.support.layer_edits import FORMATS, Entry, Layer, rdiff_streams, tar_of


def _layer(rng: random.Random, files: int, size: int) -> Layer:
    return [
        Entry("d", None),
        *(Entry(f"d/{number}", rng.randbytes(size)) for number in range(files)),
    ]


def _touched(at: int) -> Callable[[random.Random, Layer], Layer]:
    return lambda _rng, layer: [
        *layer[:at],
        layer[at]._replace(mtime=1_700_086_400),
        *layer[at + 1 :],
    ]


def _inserted(at: int) -> Callable[[random.Random, Layer], Layer]:
    return lambda rng, layer: [*layer[:at], Entry("new", rng.randbytes(100)), *layer[at:]]


def _replaced(rng: random.Random, layer: Layer) -> Layer:
    content = layer[1].content or b""
    middle = len(content) // 2
    changed = content[:middle] + rng.randbytes(300) + content[middle + 300 :]
    return [layer[0], layer[1]._replace(content=changed), *layer[2:]]


METERED = pricing(Form.GZIP, 0)

CHANGES = {
    "the folder's mtime": _touched(0),
    "a file's mtime": _touched(1),
    "a file added first": _inserted(0),
    "a file added in the middle": _inserted(2),
    "300 bytes in the middle": _replaced,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_last_unchanged_stretch_is_copied(change: str, form: int) -> None:
    for files, size in ((1, 1000), (1, 3_000_000), (100, 1000), (5, 70_000)):
        rng = random.Random(size)
        layer = _layer(rng, files, size)
        base, target = tar_of(layer, form), tar_of(CHANGES[change](rng, layer), form)
        (rdiffs,) = rdiff_streams([base], [target])
        for effort in Effort:
            made = build([base], target, effort=effort, price=0)
            assert len(made.stream) <= len(rdiffs) + 300, (effort, files, size)


def _spans(*spans: tuple[int, int, int]) -> Any:
    return ffi.new(
        "od_span[]", [dict(zip(("at", "size", "source"), span, strict=True)) for span in spans]
    )


def _job(spans: Any, start: int, end: int, effort: Effort = Effort.BALANCED) -> Any:
    return ffi.new(
        "od_job *",
        {
            "from": start,
            "to": end,
            "spans": spans,
            "span_count": len(spans),
            "effort": TUNINGS[effort].c,
        },
    )


def _plan(*commands: tuple[int, int]) -> Any:
    array = ffi.new("od_command[]", [{"size": size, "source": source} for size, source in commands])
    return ffi.gc(lib.od_plan_of(array, len(commands)), lib.od_free_plan)


def test_lost_bytes_are_counted() -> None:
    spans = _spans((100, 2000, 0), (3000, 1000, 9000), (3500, 700, 50_000))

    def lost(*commands: tuple[int, int], start: int = 0, end: int = 5000) -> int:
        return int(lib.od_lost(_job(spans, start, end), _plan(*commands), METERED))

    assert lost((100, NONE), (2000, 0), (900, NONE), (1000, 9000), (200, 50_500), (800, NONE)) == 0
    assert lost((5000, NONE)) == 2000 + 1000 + 700
    assert (
        lost((900, NONE), (1100, NONE), (3000, NONE)) == 3700
    )  # one long literal in several commands
    assert (
        lost((611, NONE), (1489, 511), (900, NONE), (1000, 9000), (1000, NONE)) == 0
    )  # 511 bytes are few enough
    assert lost((612, NONE), (1488, 512), (900, NONE), (1000, 9000), (1000, NONE)) == 512
    assert (
        lost((500, NONE), (1, 400), (1599, NONE), (900, NONE), (1000, 9000), (1000, NONE)) == 1599
    )
    assert lost((400, NONE), (2600, NONE), start=2000) == 1000 + 700
    assert lost((300, NONE), (300, NONE), start=50, end=650) == 550


@pytest.mark.parametrize("effort", Effort)
def test_known_spans_alone_make_a_valid_plan(effort: Effort) -> None:
    spans = _spans((100, 2000, 0), (3000, 1000, 9000), (3500, 700, 50_000), (4800, 4, 7))
    made = ffi.gc(lib.od_plan_known(_job(spans, 50, 5000, effort)), lib.od_free_plan)
    commands = [
        (made.commands[number].size, made.commands[number].source) for number in range(made.count)
    ]
    assert commands == [
        (50, NONE),
        (2000, 0),
        (900, NONE),
        (1000, 9000),
        (200, 50_500),
        (800, NONE),
    ]


class _FaultyKernel:
    """A kernel whose plan is all literals, written by hand because no input makes the real one
    lose bytes.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def od_plan_job(self, job: Any, _matches: Any, _pricing: Any) -> Any:
        size = job.to - getattr(job, "from")
        return lib.od_plan_of(ffi.new("od_command[]", [{"size": size, "source": NONE}]), 1)


def test_a_plan_that_loses_known_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    layer = _layer(rng, 30, 20_000)
    base, target = tar_of(layer, FORMATS[0]), tar_of(_touched(0)(rng, layer), FORMATS[0])
    monkeypatch.setattr(planner, "lib", _FaultyKernel())
    with pytest.raises(AssertionError, match="known bytes became literals"):
        build([base], target)
    monkeypatch.setattr(planner, "STRICT", False)
    made = build([base], target)
    assert made.layer.lost > 590_000
    assert len(made.stream) < 2000
    assert made.layer.excess == 0


def test_a_layer_larger_than_its_entries_account_for_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(2)
    layer = _layer(rng, 30, 20_000)
    base, target = tar_of(layer, FORMATS[0]), tar_of(_inserted(3)(rng, layer), FORMATS[0])
    assert build([base], target).layer.excess == 0
    other = tar_of(_layer(rng, 30, 20_000), FORMATS[0])
    assert build([base], other).layer.excess == 0  # all of it is new
    assert build([b""], rng.randbytes(500_000)).layer.excess == 0  # and no tar
    monkeypatch.setattr(planner, "lib", _FaultyKernel())
    monkeypatch.setattr(_FaultyKernel, "od_lost", lambda *_: 0, raising=False)
    made = build([base], target)
    assert 590_000 < made.layer.excess < made.layer.size
