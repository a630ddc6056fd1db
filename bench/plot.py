"""The plot of bytes per pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl

from bench.results import Result

mpl.use("Agg")
from matplotlib import pyplot as plt


def _effort(effort: str, result: Result) -> int | None:
    return result.efforts[effort].size if effort in result.efforts else None


_SERIES: tuple[tuple[str, str, Callable[[Result], int | None]], ...] = (
    ("full update", "#bbbbbb", lambda r: r.full),
    ("rdiff + gzip", "#e69f00", lambda r: r.peer.size),
    ("obdelta fast", "#9fd0f5", partial(_effort, "fast")),
    ("obdelta balanced", "#0072b2", partial(_effort, "balanced")),
    ("obdelta small", "#003a5c", partial(_effort, "small")),
    ("zstd --patch-from (bound)", "#b8dfc9", lambda r: r.bounds.zstd),
    ("bsdiff (bound)", "#009e73", lambda r: r.bounds.bsdiff),
)
"""Label, colour (Okabe and Ito's, which colour-blind readers can distinguish), bytes."""


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws a PNG: a group of bars a pair, bytes on a logarithmic axis. A bar that was not
    measured is left out.
    """
    figure, axes = plt.subplots(figsize=(13, 6), layout="constrained")
    width = 0.86 / len(_SERIES)
    for number, (label, colour, size) in enumerate(_SERIES):
        places = [
            index + (number - (len(_SERIES) - 1) / 2) * width for index in range(len(results))
        ]
        sizes = [size(result) for result in results]
        shown = [
            (place, value) for place, value in zip(places, sizes, strict=True) if value is not None
        ]
        axes.bar(
            [place for place, _ in shown],
            [value for _, value in shown],
            width,
            color=colour,
            label=label,
        )
    axes.set_yscale("log")
    axes.set_ylabel("bytes on the wire (logarithmic)")
    axes.set_xticks(
        range(len(results)), [result.name for result in results], rotation=25, ha="right"
    )
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title("Bytes that a device downloads, per update")
    axes.legend(ncols=4, loc="upper left", fontsize="small")
    axes.margins(x=0.01, y=0.15)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
