"""Plots, rendered on the server as SVG; the style sheet sets the colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from twisted.web.template import Tag, tags

from obdelta.store.catalogue.tables.counters import HOUR, Served
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import picture, svg, table

DAY = 24


class Step(NamedTuple):
    """The step of a plot: its length in hours, how many are drawn, and the shape of its times.
    ``first`` is the time of any step's begin, in seconds UTC.
    """

    hours: int
    drawn: int
    shape: str
    first: int = 0


STEPS: Final[Mapping[str, Step]] = {
    "hour": Step(1, 48, "%H:%M"),
    "day": Step(DAY, 30, "%d %b"),
    "week": Step(7 * DAY, 52, "%d %b", 4 * DAY * HOUR),
}
"""The steps to choose from. Weeks begin on Monday, as 5 January 1970 was one."""
HOURS_PLOTTED = STEPS["hour"].drawn * HOUR
DAYS_PLOTTED = STEPS["week"].drawn * STEPS["week"].hours * HOUR
"""Seconds of which hours, and days, are needed."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 220, 118, 26, 14


def unit_of(days: Sequence[Served], now: float) -> str:
    """Returns the step if none is chosen: hours for less than two days of data, then days."""
    oldest = min((one.start for one in days), default=now)
    return "hour" if now - oldest < HOURS_PLOTTED else "day"


def saved_over_time(
    hours: Sequence[Served], days: Sequence[Served], now: float, unit: str = ""
) -> Tag:
    """Returns a bar chart of bytes sent and saved, with the figures in a collapsible
    table below, and links to the other steps. ``unit``: one of :data:`STEPS`, or "".
    """
    unit = unit or unit_of(days, now)
    step = STEPS[unit]
    width, count = step.hours * HOUR, step.drawn
    last = (int(now) - step.first) // width * width + step.first
    by_start: dict[int, Served] = {}
    for one in hours if unit == "hour" else days:
        start = (one.start - step.first) // width * width + step.first
        had = by_start.get(start, Served(start, 0, 0, 0))
        by_start[start] = Served(
            start,
            had.deltas + one.deltas,
            had.full_bytes + one.full_bytes,
            had.delta_bytes + one.delta_bytes,
        )
    steps = [
        by_start.get(start, Served(start, 0, 0, 0))
        for start in range(last - (count - 1) * width, last + width, width)
    ]
    rows = [
        [
            _when(one.start, step),
            number_format.number(one.deltas),
            number_format.size(one.full_bytes),
            number_format.size(one.delta_bytes),
            number_format.size(one.full_bytes - one.delta_bytes),
        ]
        for one in reversed(steps)
        if one.deltas
    ]
    first = f"{'Week from' if unit == 'week' else unit.capitalize()} (UTC)"
    columns = [first, "Deltas", "In full", "As deltas", "Saved"]
    return tags.figure(
        _choices(unit),
        _bars(steps, step, f"Bytes sent and saved by {unit}"),
        tags.figcaption(
            tags.span(swatch("sent"), " sent as deltas"),
            tags.span(swatch("saved"), " saved"),
            tags.span(f"by {unit}, {_range(steps, step)} UTC"),
        ),
        tags.details(
            tags.summary("The same as a table"),
            (
                table(f"Served by {unit}", columns, rows, numeric=(1, 2, 3, 4))
                if rows
                else tags.p("Nothing yet.")
            ),
            id="saved-table",
        ),
    )


def _choices(chosen: str) -> Tag:
    return tags.nav(
        *(
            tags.a(
                f"By {unit}",
                href=f"/?by={unit}#saved",
                **({"aria-current": "true"} if unit == chosen else {}),
            )
            for unit in STEPS
        ),
        class_="choices",
        **{"aria-label": "Step of the plot"},
    )


def _range(steps: Sequence[Served], step: Step) -> str:
    """Returns the first and the last time that a plot covers."""
    hourly = step.hours == 1
    shape = "%Y-%m-%d %H:%M" if hourly else "%Y-%m-%d"
    first, last = steps[0].start, steps[-1].start + (HOUR if hourly else 0)
    times = (datetime.fromtimestamp(when, UTC).strftime(shape) for when in (first, last))
    return " to ".join(times)


def _bars(steps: Sequence[Served], step: Step, title: str) -> Tag:
    most = _round_up(max((max(one.full_bytes, one.delta_bytes) for one in steps), default=0))
    inner_width, inner_height = _WIDTH - _LEFT, _HEIGHT - _BOTTOM - _TOP
    pitch = inner_width / len(steps)
    drawn: list[Tag] = []
    for line in range(5):
        y = _TOP + inner_height * line / 4
        drawn.append(
            svg("line", class_="grid", x1=str(_LEFT), x2=str(_WIDTH), y1=f"{y:.1f}", y2=f"{y:.1f}")
        )
        if most:
            drawn.append(
                svg(
                    "text",
                    number_format.size(most * (4 - line) / 4),
                    x=str(_LEFT - 8),
                    y=f"{y + 4:.1f}",
                    text_anchor="end",
                )
            )
    for index, one in enumerate(steps):
        x = _LEFT + pitch * index
        if index % (len(steps) // 6) == 0:
            drawn.append(svg("text", _when(one.start, step), x=f"{x:.1f}", y=str(_HEIGHT - 6)))
        if not one.deltas:
            continue
        scale = inner_height / most if most else 0.0
        sent, whole = one.delta_bytes * scale, max(one.full_bytes, one.delta_bytes) * scale
        saved = one.full_bytes - one.delta_bytes
        tip = (
            f"{_when(one.start, step)}: {number_format.size(one.delta_bytes)} sent,"
            f" {number_format.size(saved)} saved"
        )
        bar = {"x": f"{x + pitch * 0.1:.1f}", "width": f"{pitch * 0.8:.1f}"}
        base = _TOP + inner_height
        drawn.append(
            svg(
                "g",
                svg("title", tip),
                svg(
                    "rect",
                    class_="saved",
                    y=f"{base - whole:.1f}",
                    height=f"{whole - sent:.1f}",
                    **bar,
                ),
                svg("rect", class_="sent", y=f"{base - sent:.1f}", height=f"{sent:.1f}", **bar),
            )
        )
    return picture(title, _WIDTH, _HEIGHT, *drawn, class_="plot")


def _when(start: int, step: Step) -> str:
    return datetime.fromtimestamp(start, UTC).strftime(step.shape)


def _round_up(value: int) -> float:
    """Returns the next figure of one digit and zeros whose quarters are short too."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 3, 4, 6, 8, 10) if power * factor >= value)


def use_of_store(parts: Mapping[str, int], quota: int) -> Tag:
    """Returns one bar with each kind's share of the quota."""
    whole = max(quota, sum(parts.values()), 1)
    drawn, x = (
        [svg("rect", class_="free", x="0", y="0", width=str(_WIDTH), height="22", rx="4")],
        0.0,
    )
    for kind, used in parts.items():
        width = _WIDTH * used / whole
        tip = svg("title", f"{kind}: {number_format.size(used)}")
        drawn.append(
            svg("rect", tip, class_=kind, x=f"{x:.1f}", y="0", width=f"{width:.1f}", height="22")
        )
        x += width
    label = f"{number_format.size(sum(parts.values()))} of {number_format.size(quota)} used"
    return tags.figure(
        picture(label, _WIDTH, 22, *drawn, class_="use", preserveAspectRatio="none"),
        tags.figcaption(
            *(
                tags.span(swatch(kind), f" {kind} {number_format.size(used)}")
                for kind, used in parts.items()
            ),
            tags.span(f"{label} ({number_format.share(sum(parts.values()), quota)})"),
        ),
    )


def share_bar(part: float, whole: float) -> Tag:
    """Returns a thin bar that repeats the figure beside it."""
    width = 100 * min(1.0, part / whole) if whole else 0.0
    return svg(
        "svg",
        svg("rect", class_="free", x="0", y="0", width="100", height="6", rx="3"),
        svg("rect", class_="sent", x="0", y="0", width=f"{width:.1f}", height="6", rx="3"),
        class_="share",
        viewBox="0 0 100 6",
        aria_hidden="true",
        preserveAspectRatio="none",
    )


def swatch(kind: str) -> Tag:
    """Returns a small square in the colour of a kind, for a legend."""
    return svg(
        "svg",
        svg("rect", class_=kind, x="0", y="0", width="10", height="10", rx="2"),
        class_="swatch",
        viewBox="0 0 10 10",
        aria_hidden="true",
    )
