"""A killed server leaves no process: its child processes end by themselves, whatever they do, and
another server can start.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path

from bench.registry import serving
from tests.support.fault_fleet import PATIENCE, Fleet, make_fleet, repository, until_tidy
from tests.support.held_rsync import HeldRsync
from tests.support.processes import until
from tests.support.server import running_server


def descendants(pid: int) -> dict[int, str]:
    """Returns the descendants' commands by process ID. Source: proc(5), ``task/*/children``."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, (task / "children").read_text("ascii").split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found[child] = (
                        Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
                    found |= descendants(child)
    return found


def until_ended(processes: dict[int, str]) -> None:
    """Waits until all of them have ended; ``processes`` as from :func:`descendants`."""
    ends: dict[int, str] = {}
    for pid, line in processes.items():
        with contextlib.suppress(ProcessLookupError):
            ends[os.pidfd_open(pid)] = line
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    while ends:
        ended = poll.poll(PATIENCE * 1000)
        assert ended, f"still there: {list(ends.values())}"
        for end, _ in ended:
            poll.unregister(end)
            os.close(end)
            del ends[end]


def test_children_of_killed_processes_end(tmp_path: Path) -> None:
    """A killed recorder leaves an rsync in the middle of its batch. A killed server leaves such an
    rsync, workers, and another server process. All of them end.
    """
    rsync = HeldRsync(tmp_path / "bin")
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        with running_server(
            state, upstream=registry, environment=rsync.environment, processes="2"
        ) as server:

            def ask() -> None:
                base, target = (f"{server.host}/{repository(number)}" for number in (0, 1))
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(
                        f"{server.url}/api/v2/delta?src={base}&dest={target}", timeout=PATIENCE
                    ).close()

            def at_work(*names: str) -> dict[int, str]:
                """Returns the processes with these names in their commands, once there is one of
                each.
                """

                def found() -> dict[int, str]:
                    running = descendants(server.process.pid).items()
                    by_name = [
                        {pid: line for pid, line in running if name in line} for name in names
                    ]
                    return (
                        {pid: line for some in by_name for pid, line in some.items()}
                        if all(by_name)
                        else {}
                    )

                return until(f"{names} are there", found)

            asking = threading.Thread(target=ask)
            asking.start()
            first = at_work("--only-write-batch")
            (recorder,) = at_work("obdelta.rsync.recorder")
            os.kill(recorder, signal.SIGKILL)
            until_ended(first)
            # The build is retried once.
            left = at_work(
                "obdelta.processes.worker_main",
                "obdelta.app.server_process",
                "obdelta.rsync.recorder",
                "--only-write-batch",
            )
            assert not left.keys() & {recorder, *first}
            server.process.kill()
            server.process.wait()
            asking.join()
            until_ended(left)
        with running_server(state, upstream=registry, max_delta_ratio="10") as server:
            assert Fleet(registry).update(server.url, 0).is_delta
            until_tidy(state, server.operator_url)
