"""Times of downloads, with a simulated clock and connection."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from twisted.internet.task import Clock

from obdelta.web.devices.file_body import MAX_OWN, MAX_UNEVEN, DownloadPace

SIZE = 64 * 112 * 1024
PIECE = 112 * 1024


def timed(seconds: Sequence[float], size: int = SIZE, *, reading: float = 0.0) -> list[float]:
    """Returns the report of a download that requested a piece after each of ``seconds``;
    ``reading`` of each is the server's reading.
    """
    clock, found = Clock(), list[float]()
    pace = DownloadPace(size, clock, found.append)
    sent = 0
    for wait in seconds:
        clock.advance(wait - reading)
        pace.wanted(sent)
        clock.advance(reading)
        pace.read()
        sent = min(sent + PIECE, size)
    assert sent == size
    pace.finished()
    return found


def test_a_steady_download_gives_its_time() -> None:
    assert timed([1.0] * 64) == [pytest.approx(64)]


@pytest.mark.parametrize("buffered", [5, 20, 31])
def test_bytes_in_buffers_do_not_count(buffered: int) -> None:
    assert timed([0.0] * buffered + [1.0] * (64 - buffered)) == [pytest.approx(64)]


@pytest.mark.parametrize("buffered", [46, 50, 64])
def test_a_download_within_the_buffers_gives_no_time(buffered: int) -> None:
    assert timed([0.0] * buffered + [1.0] * (64 - buffered)) == []


@pytest.mark.parametrize("where", [35, 60])
def test_a_stalled_download_gives_no_time(where: int) -> None:
    seconds = [1.0] * 64
    seconds[where] = 16 * MAX_UNEVEN
    assert timed(seconds) == []


def test_a_stop_before_the_second_half_does_not_matter() -> None:
    seconds = [1.0] * 64
    seconds[10] = 1000.0
    assert timed(seconds) == [pytest.approx(64)]


def test_waits_for_the_servers_disk_do_not_count() -> None:
    assert timed([1.0] * 64, reading=0.9 * MAX_OWN) == [pytest.approx(64)]
    assert timed([1.0] * 64, reading=1.2 * MAX_OWN) == []
