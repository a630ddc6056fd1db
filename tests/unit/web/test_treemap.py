"""The treemap of a delta: rectangles fill the area in proportion, and names are escaped."""

from __future__ import annotations

import re
from typing import Any

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st

from obdelta.delta.reports.image_report import DeltaReport, report
from obdelta.web.operators.pages.markup import fragment
from obdelta.web.operators.pages.treemap import MAX_AREAS, Box, squarified, treemap


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=60),
    st.floats(1, 2000),
    st.floats(1, 2000),
)
def test_rectangles_fill_the_box_in_proportion(
    sizes: list[int], width: float, height: float
) -> None:
    sizes.sort(reverse=True)
    boxes = squarified(sizes, Box(0, 0, width, height))
    assert len(boxes) == len(sizes)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(
            size / sum(sizes) * width * height, rel=1e-6, abs=1e-6
        )
        assert box.x >= -1e-6 and box.x + box.width <= width * (1 + 1e-6) + 1e-6
        assert box.y >= -1e-6 and box.y + box.height <= height * (1 + 1e-6) + 1e-6
    for index, one in enumerate(boxes[:20]):
        for other in boxes[index + 1 : 20]:
            across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert min(across, down) <= 1e-6 * max(width, height)


def of(files: int, name: str = "f{}") -> DeltaReport:
    top: list[dict[str, Any]] = [
        {
            "literal_bytes": 10,
            "copied_bytes": 0,
            "copies": 0,
            "small_copies": 0,
            "wire_bytes": 100 + number,
            "name": name.format(number),
            "size": 10,
        }
        for number in range(files)
    ]
    layer = {
        "target": "sha256:" + "0" * 64,
        "size": sum(file["wire_bytes"] for file in top) + 50,
        "explained": {"entries": files, "changed": files, "top": top, "rest": None},
    }
    return report({"layers": [layer]}, 10**6, layer["size"])


@pytest_twisted.ensureDeferred
async def test_names_are_escaped_and_the_number_of_areas_is_bounded() -> None:
    drawn = await fragment(treemap(of(500, "<b>\u202e{}")))
    assert drawn.count("<title>layer 1: ") == MAX_AREAS + 1
    assert "<b>" not in drawn and "\u202e" not in drawn
    assert "&lt;b&gt;\\u202e" in drawn
    assert re.search(r"<title>layer 1: rest of layer 1: ", drawn)


@pytest_twisted.ensureDeferred
async def test_a_delta_without_bytes_has_no_map() -> None:
    assert "No bytes to draw." in await fragment(treemap(report({}, 0, 0)))
