"""The time of day may be set back and forth: nothing that waits hangs. With Debian's faketime
around real servers.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from twisted.internet.epollreactor import EPollReactor

from obdelta.concurrency.clock import use_monotonic_time
from tests.server.test_processes import ask, metrics
from tests.support.faketime import SystemTime, system_time
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import connection_to, serving, until
from tests.support.server import RunningServer, running_server
from tests.support.stack import running_stack

DEVICES = 'endpoint="devices",route="/healthz"'
HANGING = 40.0
"""Seconds until a test believes that an answer never comes."""


@contextmanager
def silent_upstream() -> Iterator[tuple[str, threading.Semaphore]]:
    """Takes connections and never answers; the semaphore counts the requests."""
    asked = threading.Semaphore(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def take() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                taken.append(connection)
                connection.recv(1)
                asked.release()

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


@pytest.fixture
def time_of_day(tmp_path: Path) -> SystemTime:
    return system_time(tmp_path)


def question(server: RunningServer) -> str:
    return (
        f"/api/v3/delta?src={server.host}/{BASE_REPOSITORY}&dest={server.host}/{TARGET_REPOSITORY}"
    )


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_held_request_ends_when_the_clock_is_set(
    hours: int, time_of_day: SystemTime, tmp_path: Path
) -> None:
    """And so does the stop, whose drain is a timer too."""
    with (
        silent_upstream() as (upstream, asked),
        running_server(
            tmp_path / "state", upstream=upstream, hold="2", environment=time_of_day.environment
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANGING)
        answer = pool.submit(ask, connection, question(server))
        assert asked.acquire(timeout=HANGING)
        time_of_day.set(hours)
        status, _, body = answer.result()
        assert status in (502, 504), body
        connection.close()


def test_a_further_process_counts_on_when_the_clock_is_set_back(
    time_of_day: SystemTime, tmp_path: Path
) -> None:
    with (
        silent_upstream() as (upstream, _),
        running_server(
            tmp_path / "state",
            upstream=upstream,
            processes="2",
            environment=time_of_day.environment,
        ) as server,
    ):
        (further,) = serving(server, 1)
        time_of_day.set(-1)
        connection = connection_to(server, further)
        assert ask(connection, "/healthz")[0] == 200
        connection.close()
        until(
            "it was counted", lambda: metrics(server, "obdelta_http_requests_total", DEVICES) >= 1
        )


def test_tokens_and_what_is_shown_follow_the_time_of_day(
    time_of_day: SystemTime, tmp_path: Path
) -> None:
    pair: Pair = make_pair(tmp_path / "pair", size=1 << 18)
    with (
        running_stack(tmp_path / "stack", pair) as stack,
        stack.server(environment=time_of_day.environment) as server,
    ):
        assert stack.ask(server)[0] == 200
        time_of_day.set(24)
        status, _, _ = stack.ask(server)
        assert status == 401  # the token of now has ended
        time_of_day.set(0)
        assert stack.ask(server)[0] == 200


def test_timers_that_were_set_before_keep_their_delay() -> None:
    fresh = EPollReactor()
    before = fresh.callLater(5, lambda: None)
    use_monotonic_time(fresh)
    after = fresh.callLater(6, lambda: None)
    assert abs(fresh.seconds() - time.monotonic()) < 60
    assert 4 < before.getTime() - fresh.seconds() <= 5
    assert before.getTime() < after.getTime()
    assert (fresh.timeout() or 0) <= 5
    for call in (before, after):
        call.cancel()
