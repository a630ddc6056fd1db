"""A server with two fleets, one of which attacks: measures the other one's updates and their
delays.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.registry import serving
from tests.support.attacks import NO_ATTACK, PASSWORD, Plan
from tests.support.fault_fleet import Tally, make_fleet, repository
from tests.support.processes import until
from tests.support.server import running_server
from tests.support.tenants import PATIENCE, Built, Tenants
from tests.support.tokens import Issuer


@contextmanager
def two_fleets(
    directory: Path, updates: int, attack: Plan = NO_ATTACK, **options: str
) -> Iterator[Tenants]:
    """Yields a server with token authentication, and a real registry with the images of both
    fleets.
    """
    issuer = Issuer()
    given: dict[str, Any] = {
        "max_builds": "1",
        "effort": "fast",
        "max_delta_ratio": "10",
        "log_format": "json",
        "upstream_credentials": "none",
        **attack.options,
        **options,
    }
    with (
        serving(directory / "registry") as registry,
        socket.create_server(("127.0.0.1", 0)) as trap,
    ):
        trap.setblocking(False)
        make_fleet(directory / "ours", registry, updates + 1)
        hostile = [f"v2/{number:032x}" for number in range(0xBAD00, 0xBAD00 + attack.images)]
        attack.push(directory / "theirs", registry, hostile)
        with running_server(
            directory / "state",
            upstream=registry,
            auth="token",
            auth_key=str(issuer.write(directory)),
            auth_issuer=issuer.issuer,
            auth_audience=issuer.audience,
            auth_realm="https://api.example.com/auth/v1/token",
            environment={"OBDELTA_BUILDER_TOKEN": PASSWORD},
            **given,
        ) as server:
            data = directory / "registry/data/docker/registry/v2/repositories"
            yield Tenants(server, registry, issuer, hostile, trap, data)


@dataclass(frozen=True)
class Passed:
    """The result of one update. ``before``: hostile builds that ended while its build was queued
    or ran.
    """

    seconds: float
    before: int


def attacked(tenants: Tenants, attack: Plan, updates: int, tally: Tally) -> list[Passed]:
    """Updates the other fleet several times during the attack, each time with another device."""
    threads = [
        threading.Thread(target=one, args=(tenants, number), daemon=True)
        for number, one in enumerate(attack.threads)
    ]
    for thread in threads:
        thread.start()
    passed = []
    try:
        until("the attack begins", lambda: len(tenants.built()) >= attack.begun, PATIENCE)
        for number in range(updates):
            began, at = time.monotonic(), time.time()
            assert tenants.update(number, f"d_ours_{number}"), "the device was led to a full pull"
            seconds = time.monotonic() - began
            passed.append(Passed(seconds, _before(tenants, repository(number + 1), at)))
    finally:
        tenants.stop.set()
        for thread in threads:
            thread.join(90)
    hostile = sum(one.target in tenants.hostile for one in tenants.built())
    tally.add("hostile builds that were done meanwhile", hostile)
    return passed


def _before(tenants: Tenants, target: str, since: float) -> int:
    """Returns the hostile builds that ended while a build of the target was queued or ran.

    If the target had several builds (a rebuild of evicted layers is one), the largest number
    counts. If it had none, those count that ended since the device's request.
    """
    built = tenants.built()
    own = [one for one in built if one.target == target]
    own = own or [Built(target, since, time.time())]
    ends = [one.ended for one in built if one.target in tenants.hostile]
    return max(sum(one.began < end < one.ended for end in ends) for one in own)
