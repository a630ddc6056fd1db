"""Two frontends and four workers on machines of their own (network namespaces), one redis-server,
one docker-registry: one of them is killed with SIGKILL at a random moment while devices update.
Every device ends verified, and no delta is built more than twice. So it is for v2 batches.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdelta.device.http import ServerFault
from obdelta.store.catalogue.records import Kind
from tests.support.fault_fleet import Fleet, Tally, check_store, make_fleet
from tests.support.network import Machine, running_network
from tests.support.redis import running_redis
from tests.support.registry import running_registry
from tests.support.server import RunningServer, command, free_port, running_server
from tests.support.workers import worker_command

KILLS = 5
FRONTENDS, WORKERS, DEVICES = 2, 4, 3
PATIENCE = 180.0
MOMENTS = 1.5
"""Seconds from the first request in which the kill comes. A build takes about one."""
CONSTANTS = {
    "obdelta.builds.replicas.leases.LEASE_SECONDS": 4,
    "obdelta.builds.workers.job_loop.HEARTBEAT_SECONDS": 6,
    "obdelta.builds.workers.job_loop.BEAT_EVERY": 1,
}


class Member:
    """A frontend or a worker on a machine, which may be started again with what it had."""

    def __init__(
        self, machine: Machine, state: Path, upstream: str, redis: str, *, worker: bool
    ) -> None:
        self.machine, self.state, self._upstream, self._redis = machine, state, upstream, redis
        self.worker, self.port, self._operators = worker, free_port(), free_port()
        self.hosts = ""
        self._running = ExitStack()
        self.server: RunningServer

    def start(self) -> None:
        """Starts it, on the same ports as before."""
        base = worker_command if self.worker else command
        self.server = self._running.enter_context(
            running_server(
                self.state,
                upstream=self._upstream,
                port=self.port,
                operator_port=self._operators,
                address=self.machine.address,
                run=lambda *options: self.machine.command(base(*options, constants=CONSTANTS)),
                environment={"OBDELTA_SHARED": self._redis},
                builds="workers",
                upstream_credentials="none",
                registry_hosts=self.hosts,
                request_timeout="3",
                max_builds="1" if self.worker else "4",
                drain="1",
            )
        )

    def stop(self) -> None:
        """Stops it in order, where it runs."""
        self._running.close()


def built(members: list[Member], kind: Kind) -> Counter[tuple[str, str]]:
    """Returns how often workers have built each delta: a pair, and the bytes of the form."""
    pattern = re.compile(rf"build: pair={kind} (.*) outcome=ready full=\d+ delta=(\d+)")
    return Counter(
        (pair, size)
        for member in members
        if member.worker
        for pair, size in pattern.findall(member.server.log)
    )


def run_machine_kills(
    directory: Path, kills: int, tally: Tally, seed: int = 19, kind: Kind = "v3"
) -> None:
    """Kills a frontend, a worker or Redis ``kills`` times, each while devices update by deltas of
    that kind.
    """
    source = random.Random(seed)
    with ExitStack() as stack:
        network = stack.enter_context(running_network(FRONTENDS + WORKERS))
        redis = stack.enter_context(running_redis(directory / "redis", address=network.address))
        registry = stack.enter_context(
            running_registry(directory / "registry", address=network.address)
        )
        images = make_fleet(directory / "images", registry.url, kills + 1, size=300_000)
        fleet = Fleet(registry.url)
        members = [
            Member(
                machine,
                directory / f"state-{place}",
                registry.url,
                redis.url,
                worker=place >= FRONTENDS,
            )
            for place, machine in enumerate(network.machines)
        ]
        frontends = members[:FRONTENDS]
        hosts = " ".join(f"{member.machine.address}:{member.port}" for member in frontends)
        for member in members:
            member.hosts = hosts
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Member.start, members))
        for member in members:
            stack.callback(member.stop)

        def device(place: int, number: int, begun: threading.Barrier) -> None:
            begun.wait(30)
            deadline = time.monotonic() + PATIENCE
            while True:
                frontend = frontends[place % FRONTENDS].server.url
                try:
                    if kind == "v2":
                        fleet.update_tree(frontend, number, images)
                        is_delta = True
                    else:
                        is_delta = fleet.update(frontend, number, timeout=6, deadline=6).is_delta
                except (ServerFault, OSError):
                    assert time.monotonic() < deadline, "a device is stuck"
                    tally.add("attempts of devices that failed and were retried")
                    place += 1
                else:
                    tally.add("devices that ended verified")
                    tally.add("of these, by a delta", int(is_delta))
                    return

        for number in range(kills):
            victim = source.choice([*members, None])
            begun = threading.Barrier(DEVICES + 1)
            with ThreadPoolExecutor(DEVICES) as pool:
                updates = [pool.submit(device, place, number, begun) for place in range(DEVICES)]
                begun.wait(30)
                threading.Event().wait(source.uniform(0, MOMENTS))  # the moment
                if victim is None:
                    redis.stop()
                    redis.start()
                    tally.add("Redis killed, and started without its data")
                else:
                    victim.server.process.kill()
                    tally.add("workers killed" if victim.worker else "frontends killed")
                    victim.stop()
                    victim.start()
                for update in updates:
                    update.result(PATIENCE + 60)
        for member in members:
            member.stop()
            tally.add("stored files compared with their digests", check_store(member.state))
        counts = built(members, kind)
        twice = sum(count == 2 for count in counts.values())
        tally.add("deltas built once", sum(count == 1 for count in counts.values()))
        tally.add("deltas built twice", twice)
        assert max(counts.values()) <= 2, counts
        pairs = Counter(pair for pair, _ in counts)
        forms = 2 if kind == "v3" else 1
        assert len(pairs) >= kills and max(pairs.values()) <= forms, pairs  # one size for each form


@pytest.mark.parametrize("kind", ["v3", "v2"])
@pytest.mark.timeout(900)
def test_one_of_all_is_killed_at_any_time(kind: Kind, tmp_path: Path) -> None:
    tally = Tally()
    run_machine_kills(tmp_path, KILLS, tally, kind=kind)
    tally.show()
    assert tally.counts["devices that ended verified"] == KILLS * DEVICES
    assert tally.counts["of these, by a delta"] == KILLS * DEVICES
