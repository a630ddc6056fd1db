"""A server that is killed leaves no process: what works for it ends by itself, wherever it is, and another one can begin."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import urllib.error
import urllib.request
from pathlib import Path

from bench.registry import serving
from tests.parts.fault_fleet import PATIENCE, Fleet, make_fleet, repository, until_tidy
from tests.parts.held_rsync import HeldRsync
from tests.parts.processes import until
from tests.parts.server import running_server


def descendants(pid: int) -> dict[int, str]:
    """Their command lines by process id. Source: proc(5), ``task/*/children``."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, (task / "children").read_text("ascii").split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found |= descendants(child)
    return found


def test_what_worked_for_a_killed_server_ends(tmp_path: Path) -> None:
    """Idle workers, a further process that serves, and a recorder with an rsync that is held in the middle of its batch."""
    rsync = HeldRsync(tmp_path / "bin")
    state = tmp_path / "state"
    with serving(tmp_path / "registry") as registry:
        make_fleet(tmp_path, registry, 2)
        with running_server(state, upstream=registry, environment=rsync.environment, processes="2") as server:

            def ask() -> None:
                base, target = (f"{server.host}/{repository(number)}" for number in (0, 1))
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(
                        f"{server.url}/api/v2/delta?src={base}&dest={target}", timeout=PATIENCE
                    ).close()

            asking = threading.Thread(target=ask)
            asking.start()
            wanted = ("obdelta.builds.worker", "obdelta.face", "obdelta.rootfs.recorder", "--only-write-batch")

            def at_work() -> dict[int, str]:
                found = descendants(server.process.pid)
                return found if all(any(name in line for line in found.values()) for name in wanted) else {}

            left = until("all of them are there", at_work)
            ends = {os.pidfd_open(pid): line for pid, line in left.items()}
            server.process.kill()
            server.process.wait()
            asking.join()
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
        with running_server(state, upstream=registry, worth="10") as server:
            assert Fleet(registry).update(server.url, 0).is_delta
            until_tidy(state, server.operator_url)
