"""Two replicas on separate machines (network namespaces), one redis-server, one docker-registry.
Either replica is cut off or killed at any time, or Redis is, while devices update.

All devices end verified; a pair is built twice only if its builder was cut.
"""

from __future__ import annotations

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdelta.device.http import ServerFault
from tests.support.fault_fleet import Fleet, check_store, make_fleet, repository
from tests.support.network import Machine, running_network
from tests.support.redis import running_redis
from tests.support.registry import running_registry
from tests.support.server import RunningServer, command, free_port, running_server

CUTS = ["network", "killed", "redis", "killed", "network"]
DEVICES, QUERY_TIMEOUT = 4, 90.0
LEASE = 2


class Replica:
    """A server on a machine, which can be restarted with its state."""

    def __init__(
        self, machine: Machine, state: Path, upstream: str, redis: str, hosts: str
    ) -> None:
        self.machine, self._state, self._upstream = machine, state, upstream
        self._port, self._redis, self._hosts = free_port(), redis, hosts
        self._running = ExitStack()
        self.server: RunningServer

    def start(self) -> None:
        """Starts it on the same port as before."""
        self.server = self._running.enter_context(
            running_server(
                self._state,
                upstream=self._upstream,
                port=self._port,
                address=self.machine.address,
                run=lambda *options: self.machine.command(
                    command(
                        *options, constants={"obdelta.builds.replicas.leases.LEASE_SECONDS": LEASE}
                    )
                ),
                environment={"OBDELTA_SHARED": self._redis},
                upstream_credentials="none",
                registry_hosts=self._hosts,
                request_timeout="3",
                drain="1",
            )
        )

    def stop(self) -> None:
        """Stops it in order, if it runs."""
        self._running.close()

    def builders_of(self, number: int) -> int:
        """Returns how often it has built the pair that begins with an image."""
        pair = (
            rf"build: pair=v3 {repository(number)}@\w+ -> {repository(number + 1)}@\w+"
            r" form=gzip outcome=ready"
        )
        return len(re.findall(pair, self.server.log))


def test_replicas_survive_cuts_of_redis_and_registry_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "obdelta.device.update.REQUEST_TIMEOUT", 6.0
    )  # otherwise a device would wait a minute for an unreachable server
    with ExitStack() as stack:
        network = stack.enter_context(running_network(2))
        redis = stack.enter_context(running_redis(tmp_path / "redis", address=network.address))
        registry = stack.enter_context(
            running_registry(tmp_path / "registry", address=network.address)
        )
        make_fleet(tmp_path / "images", registry.url, len(CUTS) + 1, size=300_000)
        fleet, source = Fleet(registry.url), random.Random(6)
        replicas = [
            Replica(machine, tmp_path / f"state-{place}", registry.url, redis.url, "")
            for place, machine in enumerate(network.machines)
        ]
        hosts = " ".join(f"{replica.machine.address}:{replica._port}" for replica in replicas)
        for replica in replicas:
            replica._hosts = hosts
            replica.start()
            stack.callback(replica.stop)
        for number, cut in enumerate(CUTS):
            victim = replicas[number % 2]
            begun = threading.Barrier(DEVICES + 1)

            def device(place: int, number: int = number, begun: threading.Barrier = begun) -> None:
                begun.wait(30)
                deadline = time.monotonic() + QUERY_TIMEOUT
                while True:
                    try:
                        # As behind a balancer: a dead server gets no second request at once.
                        assert fleet.update(
                            replicas[place % 2].server.url, number, timeout=6, deadline=6
                        ).is_delta
                    except (ServerFault, OSError):
                        assert time.monotonic() < deadline, "a device is stuck"
                        place += 1
                    else:
                        return

            with ThreadPoolExecutor(DEVICES) as pool:
                updates = [pool.submit(device, place) for place in range(DEVICES)]
                begun.wait(30)
                threading.Event().wait(source.uniform(0, 0.8))  # the moment
                if cut == "network":
                    victim.machine.cut()
                elif cut == "killed":
                    victim.server.process.kill()
                else:
                    redis.stop()
                for update in updates:
                    update.result(QUERY_TIMEOUT + 30)
            if cut == "network":
                victim.machine.join()
            elif cut == "killed":
                victim.stop()
                victim.start()
            else:
                redis.start()
            builders = {
                place: replica.builders_of(number) for place, replica in enumerate(replicas)
            }
            if cut == "redis":
                assert 1 <= sum(builders.values()) <= 2
            else:
                # The killed replica may have built without having reported it.
                assert builders[(number + 1) % 2] <= 1 and sum(builders.values()) <= 2, (
                    cut,
                    builders,
                )
                assert sum(builders.values()) == 1 or builders[number % 2], (cut, builders)
        for replica in replicas:
            replica.stop()
            assert check_store(replica._state) > 0
