"""The clock may be set back and forth: no wait hangs. Real servers under Debian's faketime."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from twisted.internet.epollreactor import EPollReactor

from obdelta.concurrency.reactor import IReactor, use_monotonic_time
from tests.server.test_processes import ask, metrics
from tests.support.faketime import SystemTime, system_time
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import connection_to, serving, until
from tests.support.server import RunningServer, running_server
from tests.support.stack import running_stack

DEVICES = 'endpoint="devices",route="/healthz"'
HANGING = 40.0
"""Seconds after which a test decides that there is no answer."""


@contextmanager
def silent_upstream() -> Iterator[tuple[str, threading.Semaphore]]:
    """Runs a server that never answers a request; the semaphore counts the requests."""
    requests = threading.Semaphore(0)
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
                requests.release()

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
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
    """The stop works too, whose drain is a timer."""
    with (
        silent_upstream() as (upstream, requests),
        running_server(
            tmp_path / "state",
            upstream=upstream,
            # by then the request has reached the upstream, also on a busy machine
            request_timeout="6",
            environment=time_of_day.environment,
        ) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANGING)
        answer = pool.submit(ask, connection, question(server))
        assert requests.acquire(timeout=HANGING)
        time_of_day.set(hours)
        status, _, body = answer.result()
        assert status in (502, 504), body
        connection.close()


def test_a_server_process_goes_on_counting_when_the_clock_is_set_back(
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


def test_tokens_and_displayed_times_follow_the_time_of_day(
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
        assert status == 401  # the present token has ended
        time_of_day.set(0)
        assert stack.ask(server)[0] == 200


def test_timers_that_were_set_before_keep_their_delay() -> None:
    fresh = EPollReactor()
    before = fresh.callLater(5, lambda: None)
    use_monotonic_time(cast(IReactor, fresh))
    after = fresh.callLater(6, lambda: None)
    assert abs(fresh.seconds() - time.monotonic()) < 60
    assert 4 < before.getTime() - fresh.seconds() <= 5
    assert before.getTime() < after.getTime()
    assert (fresh.timeout() or 0) <= 5
    for call in (before, after):
        call.cancel()
