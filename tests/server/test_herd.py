"""A full queue, an orderly stop during it, and the start after that: the answers of a real server.

rsync is the real one, stopped in the middle of its batch, so that a build runs for as long as the
test needs.
"""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.registry import serving
from tests.support.fault_fleet import builds, make_fleet, repository, until_tidy
from tests.support.held_rsync import HeldRsync
from tests.support.processes import until
from tests.support.server import RunningServer, running_server


def ask(server: RunningServer, number: int) -> tuple[int, str]:
    """Requests the v2 delta from one image to the next; returns the status, and ``Retry-After``."""
    base, target = (f"{server.host}/{repository(image)}" for image in (number, number + 1))
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(
            f"{server.url}/api/v2/delta?src={base}&dest={target}&wait=true", timeout=60
        ) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get("retry-after", "")


class _Stay(urllib.request.HTTPRedirectHandler):
    """300 is an answer."""

    def redirect_request(self, *_: object) -> None:
        return None


def states(server: RunningServer) -> list[str]:
    return [build["state"] for build in builds(server.operator_url)]


def test_a_full_queue_survives_an_orderly_restart(tmp_path: Path) -> None:
    rsync = HeldRsync(tmp_path / "bin")
    state = tmp_path / "state"
    options: dict[str, Any] = {"max_builds": "1", "v2_streaming": "never", "max_delta_ratio": "10"}
    with serving(tmp_path / "registry") as registry, ThreadPoolExecutor(2) as devices:
        make_fleet(tmp_path, registry, 4)
        with running_server(
            state,
            upstream=registry,
            environment=rsync.environment,
            drain="60",
            constants={"obdelta.builds.queue.MAX_WAITING": 1},
            request_timeout="3",
            **options,
        ) as server:
            runs = devices.submit(ask, server, 0)
            until("one is built", lambda: states(server) == ["running"])
            waits = devices.submit(ask, server, 1)
            until("another waits", lambda: states(server) == ["running", "queued"])
            # A third finds the queue full, and gets a retry answer; a client of one of the two
            # would join it.
            assert ask(server, 2) == (504, "10")
            os.kill(server.process.pid, signal.SIGTERM)
            # Queued requests are answered at once; the running build finishes, and then the
            # process.
            assert waits.result() == (504, "10")
            assert not runs.done()
            os.kill(server.process.pid, signal.SIGTERM)
            rsync.go_on()
            assert runs.result()[0] == 300
            assert server.process.wait(60) == 0
            assert "Traceback" not in server.log
        with running_server(state, upstream=registry, **options) as server:
            until(
                "it goes on with what was handed back",
                lambda: "1 queued builds were resumed" in server.log,
            )
            until_tidy(state, server.operator_url)
            assert [ask(server, number)[0] for number in (0, 1)] == [300, 300]
            assert server.log.count("outcome=ready") == 1
