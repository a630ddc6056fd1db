"""v2 while rsync still writes: which client gets which bytes.

The server is real, and so is rsync, which is stopped in the middle.
"""

from __future__ import annotations

import http.client
import json
import random
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from bench.images import Image, push
from obdelta.rootfs.compare import differences
from obdelta.rsync.proof import copy_for_proof
from tests.server.test_v2 import get
from tests.support import rootfs
from tests.support.held_rsync import HeldRsync
from tests.support.registry import running_registry
from tests.support.server import RunningServer, running_server

BASE, TARGET = "v2/" + "ba" * 16, "v2/" + "7a" * 16
FILLED = "Supervisor/12.11.0 (Linux)"
"""A supervisor that accepts a padded length: it runs on Node 12 and resumes."""
STUCK = "Supervisor/14.9.4 (Linux)"


class Images:
    """Twelve files of noise that change, and a registry that has both releases."""

    def __init__(self, directory: Path) -> None:
        chance = random.Random(4)
        self.base = rootfs.image(
            [[rootfs.file("kept", chance.randbytes(50_000))]], directory / "base"
        )
        noise = [rootfs.file(f"new{number:02}", chance.randbytes(100_000)) for number in range(12)]
        self.target = rootfs.image([[rootfs.file("kept", b"other")], noise], directory / "target")
        self.directory = directory

    def tree(self, image: Image) -> Path:
        place = self.directory / f"tree-{image.image_id.hex[:8]}"
        return place / "root" if place.exists() else rootfs.tree(image, place)

    def check_target(self, stream: bytes, device: Path) -> None:
        """Asserts that the batch leads to the target: rsync applies it as a device does."""
        _, _, batch = stream.partition(b"\0")
        base, target = self.tree(self.base), self.tree(self.target)
        copy_for_proof(base, target, device)
        command = ["rsync", "--archive", "--delete", "--fake-super", "--read-batch=-", f"{device}/"]
        subprocess.run(command, input=batch, check=True, capture_output=True)
        assert list(differences(device, target)) == []


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def registry(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(images.base, running.url, BASE)
        push(images.target, running.url, TARGET)
        yield running.url


def ask(server: RunningServer, user_agent: str, extra: str = "") -> tuple[int, str]:
    """Returns ``(status, Location)``."""
    query = f"src={server.host}/{BASE}&dest={server.host}/{TARGET}{extra}"
    status, headers, _ = get(f"{server.url}/api/v2/delta?{query}", User_Agent=user_agent)
    return status, headers.get("location", "")


class Download:
    """A download that is read bit by bit."""

    def __init__(self, url: str, **headers: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        self._connection.request(
            "GET",
            f"{parts.path}?{parts.query}",
            headers={k.replace("_", "-"): v for k, v in headers.items()},
        )
        self.answer = self._connection.getresponse()
        self.body = b""

    def read(self, count: int) -> bytes:
        """Reads this number of bytes more."""
        found = self.answer.read(count)
        assert len(found) == count
        self.body += found
        return found

    def rest(self) -> bytes:
        """Reads to the end; returns the whole body. Raises IncompleteRead if it is cut."""
        try:
            self.body += self.answer.read()
        finally:
            self._connection.close()
        return self.body


def counters(server: RunningServer) -> dict[str, int]:
    with sqlite3.connect(f"file:{server.state_dir}/catalogue.sqlite?mode=ro", uri=True) as database:
        return dict(database.execute("SELECT name, value FROM counters").fetchall())


def test_chunked_clients_read_while_rsync_writes(
    registry: str, images: Images, tmp_path: Path
) -> None:
    """The order of events is fixed: rsync cannot end before both have read from it, at different
    times.
    """
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        max_delta_ratio="10",
        request_timeout="60",
    ) as server:
        first = Download(ask(server, "curl/8")[1])
        assert first.answer.getheader("transfer-encoding") == "chunked"
        assert first.read(1) == b"{"
        first.read(200_000)
        second = Download(ask(server, "curl/8")[1])
        second.read(900_000)
        assert server.log.count("outcome=") == 0
        url = ask(server, "curl/8")[1]
        assert get(url, Range="bytes=100-199")[::2] == (206, second.body[100:200])
        third = Download(url, Range="bytes=100-199", If_Range='"of another"')
        assert (third.answer.status, third.read(50_000)) == (200, second.body[:50_000])
        beyond = 1_190_000
        rsync.go_on()
        status, _, piece = get(url, Range=f"bytes={beyond}-{beyond + 9}")
        stream = first.rest()
        assert (status, piece) == (206, stream[beyond : beyond + 10])
        assert second.rest() == third.rest() == stream
        finished = get(ask(server, STUCK, "&wait=true")[1])
        assert finished[2] == stream
        assert finished[1]["content-length"] == str(len(stream))
        assert server.log.count("outcome=ready") == 1
    images.check_target(stream, tmp_path / "device")


def test_supervisors_wait_for_a_length(registry: str, tmp_path: Path) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        max_delta_ratio="10",
        request_timeout="3",
    ) as server:
        for agent in (FILLED, STUCK):
            assert ask(server, agent)[0] == 504
        rsync.go_on()
        status, url = ask(server, FILLED, "&wait=true")
        assert status == 300
        _, headers, body = get(url)
        assert headers["content-length"] == str(len(body))


def test_a_failure_of_rsync_after_the_first_bytes_cuts_the_connection(
    registry: str, tmp_path: Path
) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state", upstream=registry, environment=rsync.environment, max_delta_ratio="10"
    ) as server:
        url = ask(server, "curl/8")[1]
        download = Download(url)
        download.read(500_000)
        rsync.fail()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            download.rest()
        assert get(url)[0] == 404
        assert "told to fail" in server.log


def test_a_supervisor_reads_while_rsync_writes(
    registry: str, images: Images, tmp_path: Path
) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        v2_streaming="padded",
        constants={"obdelta.web.devices.v2.MAX_PADDING": 0.25},
        max_delta_ratio="10",
        request_timeout="3",
    ) as server:
        status, url = ask(server, FILLED, "&wait=true")
        assert status == 300
        download = Download(url)
        length = int(str(download.answer.getheader("content-length")))
        assert download.answer.getheader("accept-ranges") == "bytes"
        download.read(800_000)
        assert ask(server, STUCK)[0] == 504  # Node 14 and newer would hang if this broke off
        rsync.go_on()
        stream = download.rest()
        assert len(stream) == length
        # This URL keeps its bytes, whole and in parts; later clients get them without padding.
        plain = get(ask(server, FILLED, "&wait=true")[1])[2]
        assert 0 < length - len(plain) <= 0.25 * length
        assert get(url)[2] == stream
        filling_at = len(plain) - 30
        for start, stop in (
            (5, 10),
            (799_990, 800_010),
            (filling_at, length),
            (filling_at + 900, length),
            (length - 3, length),
        ):
            status, headers, part = get(
                url, Range=f"bytes={start}-{stop - 1 if stop < length else ''}"
            )
            assert (status, part) == (206, stream[start:stop]), start
            assert headers["content-range"] == f"bytes {start}-{stop - 1}/{length}"
        etag = get(url, method="HEAD")[1]["etag"]
        assert get(url, method="HEAD")[1]["content-length"] == str(length)
        assert get(url, Range="bytes=5-9", If_Range=etag)[2] == stream[5:10]
        assert get(url, Range="bytes=5-9", If_Range='"other"')[2] == stream
        assert get(url, Range=f"bytes={length}-")[0] == 416
        images.check_target(stream, tmp_path / "device")
        images.check_target(plain, tmp_path / "another")
        wasted = counters(server)["v2.filling_bytes"]
        assert wasted >= 3 * (length - len(plain))
        shown = get(f"{server.operator_url}/metrics")[2].decode()
        assert f'obdelta_events_total{{area="v2",event="filling_bytes"}} {wasted}.0' in shown


def test_a_batch_longer_than_announced_is_cut(
    registry: str, images: Images, tmp_path: Path
) -> None:
    """rsync reports that everything was sent, and then sends more: the download is cut, and the
    next client gets the finished batch.
    """
    rsync = HeldRsync(tmp_path / "bin", share=0.8, reported=1)
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        v2_streaming="padded",
        max_delta_ratio="10",
    ) as server:
        _, url = ask(server, FILLED, "&wait=true")
        download = Download(url)
        download.read(500_000)
        rsync.go_on()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            download.rest()
        status, again = ask(server, FILLED, "&wait=true")
        assert status == 300
        stream = get(again)[2]
        # The client gets the URL before the proof, with the announced length, or after it.
        assert parse_qs(urlsplit(again).query)["length"] in (["0"], [str(len(stream))])
        assert stream.startswith(download.body)
        for headers in ({}, {"Range": f"bytes={len(download.body)}-"}):
            status, _, body = get(url, **headers)
            assert status == 404
            assert b"announced" in body
        assert counters(server)["v2.length_exceeded"] >= 1
        images.check_target(stream, tmp_path / "device")


def test_an_old_url_never_gets_bytes_of_a_later_build(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, max_delta_ratio="10") as server:
        url = ask(server, STUCK, "&wait=true")[1]
        assert get(url)[0] == 200
    for blob in (tmp_path / "state/blobs/sha256").rglob("*"):
        if blob.is_file():
            blob.unlink()
    with running_server(
        tmp_path / "state", upstream=registry, max_delta_ratio="10", port=server.port
    ) as server:
        assert get(url)[0] == 404
        again = ask(server, "curl/8")[1]
        assert get(again)[0] == 200
        assert json.loads(get(again)[2].partition(b"\0")[0])["version"] == 2


@pytest.mark.parametrize("agent", ["curl/8", FILLED])
def test_a_batch_that_becomes_too_large_is_still_sent_completely(
    registry: str, images: Images, tmp_path: Path, agent: str
) -> None:
    """The verdict comes when most bytes are sent: this client gets the rest, and the next one
    pulls in full.
    """
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        max_delta_ratio="0.5",
        request_timeout="60",
        v2_streaming="padded",
        constants={"obdelta.web.devices.v2.MAX_PADDING": 0.5},
    ) as server:
        first = Download(ask(server, agent)[1])
        first.read(900_000)
        rsync.go_on()
        images.check_target(first.rest(), tmp_path / "device")
        assert ask(server, agent)[1].endswith("?full-pull=yes")
        assert "category=not-worth" in server.log
        assert "Traceback" not in server.log and "outcome=ready" not in server.log


def test_a_failure_cuts_the_connection_once_without_a_traceback(
    registry: str, tmp_path: Path
) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    with running_server(
        tmp_path / "state",
        upstream=registry,
        environment=rsync.environment,
        max_delta_ratio="10",
        request_timeout="60",
    ) as server:
        first = Download(ask(server, "curl/8")[1])
        first.read(900_000)
        rsync.fail()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            first.rest()
        assert "a response was cut" in server.log and "Traceback" not in server.log
        # The second attempt is not streamed: it may fail in the same way.
        with ThreadPoolExecutor(1) as beside:
            going = beside.submit(rsync.go_on)
            status, url = ask(server, "curl/8", "&wait=true")
            going.result()
        assert (status, get(url)[0]) == (300, 200)
        assert get(url)[1]["content-length"]
