"""The treemap of a delta: areas for its layers and files, in proportion to their bytes.

The layout is the squarified one of Bruls, Huizing and van Wijk (2000): rows of rectangles that are
as square as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from twisted.web.template import Tag, tags

from obdelta.delta.reports.image_report import DeltaReport, FilePart, verdict
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import picture, svg
from obdelta.web.operators.pages.plot import swatch

_WIDTH, _HEIGHT = 720, 300
_LABEL_WIDTH, _LABEL_HEIGHT, _CHARACTER = 60.0, 18.0, 6.6
_OUTLINED = 4.0
"""Layers with less on a side have no outline, which would hide them."""
_LEGEND = {
    "edited": "new or edited",
    "recompiled": "recompiled",
    "archive": "compressed or random",
    "moved": "moved, or only times changed",
    "rest": "other files of a layer",
}
"""The colours, by a kind that has it."""
MAX_AREAS = 120
"""Areas that are drawn: the largest files; the rest of each layer is one area."""


class Box(NamedTuple):
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


class _Part(NamedTuple):
    name: str
    size: int
    kind: str
    note: str


def treemap(report: DeltaReport) -> Tag:
    """Returns the figure, or a paragraph if no layer's bytes are known."""
    layers = [(layer.number, list(_parts(report, layer.number))) for layer in report.layers]
    layers = [(number, [part for part in parts if part.size > 0]) for number, parts in layers]
    layers = sorted(
        ((number, parts) for number, parts in layers if parts),
        key=lambda one: -sum(part.size for part in one[1]),
    )
    if not layers:
        return tags.p("No bytes to draw.", class_="none")
    drawn: list[Tag] = []
    sizes = [sum(part.size for part in parts) for _, parts in layers]
    for (number, parts), box in zip(
        layers, squarified(sizes, Box(0, 0, _WIDTH, _HEIGHT)), strict=True
    ):
        parts.sort(key=lambda part: -part.size)
        boxes = squarified([part.size for part in parts], box)
        for part, inner in zip(parts, boxes, strict=True):
            drawn.append(_area(number, part, inner, report.delta_bytes))
        if min(box.width, box.height) > _OUTLINED:
            drawn.append(svg("rect", class_="layer", **_placed(box)))
    title = f"Bytes of the delta by layer and file, {number_format.size(report.delta_bytes)}"
    return tags.figure(
        picture(title, _WIDTH, _HEIGHT, *drawn, class_="treemap"),
        tags.figcaption(
            tags.span("Areas are bytes of the delta; thick lines are layers."),
            *(tags.span(swatch(f"area {kind}"), f" {words}") for kind, words in _LEGEND.items()),
        ),
    )


def _parts(report: DeltaReport, number: int) -> Iterator[_Part]:
    """Yields the files of a layer that are drawn, then the rest of it."""
    layer = next(layer for layer in report.layers if layer.number == number)
    share = max(1, MAX_AREAS // max(1, len(report.layers)))
    shown: Sequence[FilePart] = layer.files[:share]
    for file in shown:
        yield _Part(file.name, file.wire_bytes, file.change or "unknown", verdict(file))
    rest = layer.wire_bytes - sum(file.wire_bytes for file in shown)
    yield _Part(f"rest of layer {number}", rest, "rest", "")


def _area(layer: int, part: _Part, box: Box, whole: int) -> Tag:
    name = number_format.visible(part.name)
    tip = (
        f"layer {layer}: {name}: {number_format.size(part.size)}"
        f" ({number_format.share(part.size, whole)})" + (f", {part.note}" if part.note else "")
    )
    pieces = [svg("title", tip), svg("rect", class_=f"area {part.kind}", **_placed(box))]
    if box.width >= _LABEL_WIDTH and box.height >= _LABEL_HEIGHT:
        most = int((box.width - 8) / _CHARACTER)
        label = name.rpartition("/")[2] or name
        shown = label if len(label) <= most else f"{label[: most - 1]}…"
        pieces.append(svg("text", shown, x=f"{box.x + 4:.1f}", y=f"{box.y + 14:.1f}"))
    return svg("g", *pieces)


def _placed(box: Box) -> dict[str, str]:
    return {
        "x": f"{box.x:.1f}",
        "y": f"{box.y:.1f}",
        "width": f"{box.width:.1f}",
        "height": f"{box.height:.1f}",
    }


def squarified(sizes: Sequence[int], box: Box) -> list[Box]:
    """Returns a rectangle for each size, in the order of the sizes, which must be positive and not
    increase. Together they fill the box.
    """
    left = float(sum(sizes))
    found: list[Box] = []
    start = 0
    while start < len(sizes):
        short = min(box.width, box.height)
        scale = box.width * box.height / left if left else 0.0
        end, total = start + 1, float(sizes[start])
        worst = _worst(sizes[start], sizes[start], total * scale, scale, short)
        while end < len(sizes):
            longer = total + sizes[end]
            ratio = _worst(sizes[start], sizes[end], longer * scale, scale, short)
            if ratio > worst:
                break
            end, total, worst = end + 1, longer, ratio
        depth = total * scale / short if short else 0.0
        along = box.x if box.width < box.height else box.y
        for size in sizes[start:end]:
            length = size * scale / depth if depth else 0.0
            if box.width < box.height:
                found.append(Box(along, box.y, length, depth))
            else:
                found.append(Box(box.x, along, depth, length))
            along += length
        if box.width < box.height:
            box = Box(box.x, box.y + depth, box.width, max(0.0, box.height - depth))
        else:
            box = Box(box.x + depth, box.y, max(0.0, box.width - depth), box.height)
        left -= total
        start = end
    return found


def _worst(largest: float, smallest: float, area: float, scale: float, short: float) -> float:
    """Returns the worst ratio of sides in a row of this ``area`` along the ``short`` side."""
    if not area or not short or not smallest:
        return float("inf")
    side = short * short
    return max(side * largest * scale / (area * area), area * area / (side * smallest * scale))
