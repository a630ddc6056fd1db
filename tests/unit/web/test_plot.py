"""Plots on the operators' pages: bars, figures, and the store's use."""

from __future__ import annotations

import pytest_twisted

from obdelta.store.catalogue.tables.counters import HOUR, Served
from obdelta.web.operators.pages.markup import fragment
from obdelta.web.operators.pages.plot import saved_over_time, use_of_store


@pytest_twisted.ensureDeferred
async def test_a_plot_has_a_bar_a_step_and_its_figures_as_a_table() -> None:
    now = 100 * 24 * HOUR + 1800.0
    hours = [Served(int(now) // HOUR * HOUR, 2, 4_000_000, 1_000_000)]
    by_hour = await fragment(saved_over_time(hours, [Served(100 * 24 * HOUR, 2, 1, 1)], now))
    assert by_hour.count('<rect class="sent"') == 2  # one of them explains the colour
    assert "by hour, 1970-04-09 01:00 to 1970-04-11 01:00 UTC" in by_hour
    assert "00:00: 1.00 MB sent, 3.00 MB saved" in by_hour
    days = [Served((100 - day) * 24 * HOUR + HOUR, 1, 1_000_000, 2_000_000) for day in range(10)]
    by_day = await fragment(saved_over_time([], days + days, now))
    assert by_day.count('<rect class="sent"') == 11
    assert "by day, 1970-03-13 to 1970-04-11 UTC" in by_day
    assert "-2.00 MB" in by_day  # the delta was larger than the full pull: this is displayed
    assert '<a href="/?by=day#saved" aria-current="true">By day</a>' in by_day
    # Weeks begin on Monday: these days are in two of them.
    by_week = await fragment(saved_over_time([], days, now, "week"))
    assert by_week.count('<rect class="sent"') == 1 + 2
    assert "by week, 1969-04-14 to 1970-04-06 UTC" in by_week
    assert '<a href="/?by=week#saved" aria-current="true">By week</a>' in by_week
    assert "by hour" in await fragment(saved_over_time(hours, days, now, "hour"))


@pytest_twisted.ensureDeferred
async def test_a_store_over_its_quota_fits_its_bar() -> None:
    html = await fragment(use_of_store({"deltas": 3_000_000, "layers": 1_000_000}, 1_000_000))
    assert "4.00 MB of 1.00 MB used (400.0 %)" in html
