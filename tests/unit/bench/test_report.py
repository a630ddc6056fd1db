"""The page of figures has the measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import releases, report, results, v2
from bench.direct import Figures
from bench.peer import Bounds, Peer
from bench.results import Result, geometric_mean
from bench.served import Served


def result(name: str, size: int, *, cold: float, peak: int, counted: bool = True) -> Result:
    figures = Figures(
        size=size,
        seconds=1.5,
        cpu=2.5,
        target_bytes=2 << 20,
        copies=300,
        small_copies=30,
        literal_bytes=4000,
        patch=0.1,
        stages={"index": 0.25, "match": 1.0},
        peak=peak,
        anonymous=peak // 2,
    )
    return Result(
        name=name,
        kind="a kind",
        counted=counted,
        changes=["sample 1 → 2"],
        base_bytes=peak,
        target_bytes=2 << 20,
        full=5000,
        peer=Peer(1000, 1.0, 2.0, 1.0, 3.5, 0.2),
        bounds=Bounds(100, None, "bsdiff needs 9 MB of memory"),
        efforts={"fast": figures, "balanced": figures, "small": figures}
        if counted
        else {"balanced": figures},
        served=Served(cold, cold / 2, [size], peak, peak // 2, 10**7),
        load=2.5,
    )


@pytest.fixture
def measured() -> list[Result]:
    return [
        result("one", 200, cold=1.0, peak=10**8),
        result("two", 800, cold=4.0, peak=10**8),
        result("huge", 999, cold=99.0, peak=10**9, counted=False),
    ]


def test_the_geometric_mean_is_right() -> None:
    assert geometric_mean([0.2, 0.8]) == pytest.approx(0.4)


def test_results_are_read_back_as_they_were_saved(tmp_path: Path, measured: list[Result]) -> None:
    results.save(measured, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == measured


def test_the_page_names_goals_that_were_missed(
    tmp_path: Path, measured: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    common = [
        releases.Result(
            "one-line", "a line", 5000, 1000, {"fast": 210, "balanced": 150, "small": 140}
        )
    ]
    report.write(measured, repeats=3, common=common)
    page = (tmp_path / "page.md").read_text()
    assert "| one-line | a line | 5,000 | 1,000 | 210 | 150 | 140 | 0.150 | met |" in page
    assert "The largest ratio of any effort is 0.210 (one-line)." in page
    assert "| delta bytes, geometric mean, `balanced` | 0.40 | ≤ 0.50 | of rdiff's | met |" in page
    assert (
        "| delta bytes, worst pair (two), `balanced` | 0.80 | ≤ 0.85 | of rdiff's | met |" in page
    )
    assert "| wall time cold, geometric mean | 0.50 | ≤ 0.70 | of rdiff's | met |" in page
    assert "| peak memory of the worker process, huge | 1000 | ≤ 600 | MB | **not met** |" in page
    assert "| one | 5,000 | 1,000 | 200 | 200 | 200 | 0.200 | 0.200 | 0.200 | 100 | – |" in page
    assert "| huge | 5,000 | 1,000 | – | 999 | – | – | 0.999 | – | 100 | – |" in page
    assert "The load average was 2.5 (median" in page
    assert "Geometric means leave out: huge" in page
    assert "- **one**: a kind.\n  - `sample 1 → 2`\n" in page
    for table in page.split("\n\n"):  # every row of a table has as many columns as its head
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


def test_the_page_has_the_measurements_of_v2(
    tmp_path: Path, measured: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [v2.label(tuning) for tuning in v2.TUNINGS]
    batches = [
        v2.Result(
            name=name,
            counted=counted,
            full=5000,
            entries=1200,
            reference=v2.Run(1000, 2.0, 3.0),
            served=size + 90,
            cold=9.5,
            again=4.25,
            applied=0.5,
            ours={one: v2.Run(size, 1.0, 1.5) for one in settings},
        )
        for name, size, counted in (("one", 250, True), ("two", 1000, True), ("huge", 2000, False))
    ]
    kept = tmp_path / "v2.json"
    v2.save(batches[:2], kept)
    v2.save(batches[1:], kept)
    assert v2.load(kept) == batches
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    report.write(measured, 3, batches)
    page = (tmp_path / "page.md").read_text()
    assert "| one | 5,000 | 1,000 | 250 | 250 | 250 | 250 | 250 | 0.250 |" in page
    assert "| **geometric mean** |  |  |  |  |  |  |  | **0.500** |" in page
    assert "| one | 1,200 | 2.0 (3.0) |" in page
    assert "| 0.50 | 9.5 | 4.2 | 0.5 |" in page
    report.write(measured, 3)
    assert "the reference needs root" in (tmp_path / "page.md").read_text()
