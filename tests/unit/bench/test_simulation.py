"""The model of large fleets, against queueing theory, and the page that it writes."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from bench import sizing, sizing_page
from bench.ready import Run
from bench.simulation import (
    Kind,
    Load,
    fleet_sizes,
    makespan,
    quantile,
    simulate,
    versions,
)

FIXED = [Kind("fixed", 6.0, 6.0, 1_000_000)]
ONE_BUILD = Load(devices=1, fleets=100, releases_per_minute=7.0, images=(1,), hours=200.0)
"""One device a fleet, so one delta a release."""


def test_a_queue_with_one_builder_waits_as_theory_says() -> None:
    """Pollaczek-Khinchine for builds of fixed length: half of rho / (1 - rho) times the length."""
    found = simulate(ONE_BUILD, FIXED, 1)
    busy = 7.0 * 6.0 / 60
    assert found.busy == pytest.approx(busy, rel=0.02)
    waited = statistics.fmean(found.ready) - 6.0
    assert waited == pytest.approx(6.0 * busy / (2 * (1 - busy)), rel=0.05)


def test_builds_that_arrive_at_once_share_the_slots() -> None:
    assert makespan([2.0, 2.0, 2.0], 1) == 6.0
    assert makespan([2.0, 2.0, 2.0], 2) == 4.0
    assert makespan([], 2) == 0.0


def test_more_workers_see_the_same_releases_and_never_take_longer() -> None:
    load = replace(Load(), devices=10_000, fleets=100, releases_per_minute=2.0, hours=2.0)
    runs = [simulate(load, FIXED, slots) for slots in (1, 2, 4)]
    assert len({(run.releases, run.builds, run.updates) for run in runs}) == 1
    for more, fewer in zip(runs[1:], runs, strict=False):
        assert all(a <= b for a, b in zip(more.ready, fewer.ready, strict=True))
        assert more.longest_queue <= fewer.longest_queue


def test_an_overloaded_worker_is_always_busy_and_falls_behind() -> None:
    found = simulate(replace(ONE_BUILD, releases_per_minute=20.0, hours=1.0), FIXED, 1)
    assert found.busy == 1.0 and found.left > 0
    assert found.longest_queue >= found.left


def test_every_device_pulls_each_delta_once() -> None:
    load = replace(ONE_BUILD, poll=60.0, hours=10.0)
    found = simulate(load, FIXED, 4)
    total = found.mean_bytes * load.hours * 3600
    # Those that pull after the end are not counted.
    assert 0.99 * found.updates * 1e6 <= total <= found.updates * 1e6
    assert found.peak_bytes >= found.mean_bytes


def test_fleets_and_versions_add_up_to_the_devices() -> None:
    sizes = fleet_sizes(Load())
    assert sum(sizes) == pytest.approx(1_000_000, rel=0.01)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= 1
    chance = random.Random(3)
    for size in (1, 7, 1000, 13_000):
        field = versions(size, 0.3, chance)
        assert sum(field) == size and min(field) >= 1
    assert versions(1000, 0.3, chance)[0] == pytest.approx(700, rel=0.1)


def test_quantiles_are_values_that_occurred() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.5, 0.95, 1.0)] == [2.0, 3.0, 3.0]
    assert quantile([], 0.5) == 0.0


def test_the_pages_of_other_benchmarks_are_read() -> None:
    found = sizing.kinds((sizing.DOCS / "benchmarks.md").read_text("utf-8"))
    assert {"app-only", "browser"} <= {kind.name for kind in found}
    assert sizing.NOT_COUNTED not in {kind.name for kind in found}
    assert all(0 < kind.indexed <= kind.cold and kind.delta_bytes > 0 for kind in found)
    assert sizing.frontend_rate((sizing.DOCS / "load.md").read_text("utf-8")) > 1e6


def test_only_the_generated_part_of_the_page_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing_page, "RATES", (1.0,))
    monkeypatch.setattr(sizing_page, "WORKERS", (1,))
    monkeypatch.setattr(sizing_page, "DEVICES", (1_000,))
    some = replace(Load(), devices=1_000, fleets=10, hours=1.0)
    monkeypatch.setattr(sizing_page, "Load", lambda: some)
    runs = [Run(1, 8.0, [2.0] * 4, 0.5), Run(2, 5.0, [2.5] * 4, 0.5, 2)]
    generated = sizing_page.part(FIXED, 318e6, runs)
    assert "| none | 1 | 8 | 1,800 | 8 | 0.5 |" in generated
    assert "| 2, each 0.4 of a core | 2 | 5 | 2,880 | 5 | 0.5 |" in generated
    page = f"before\n{sizing_page.BEGIN}\nold\n{sizing_page.END}\nbehind\n"
    assert sizing_page.written(page, generated) == f"before\n{generated}\nbehind\n"
