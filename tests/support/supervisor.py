"""A balena supervisor as the delta API sees it: when it asks again, and when it pulls in full.

A double, because the supervisor itself needs a device's engine and the cloud's API. It behaves as a
supervisor v19.0.5 was measured to, with the same intervals (``docs/wire-protocol.md``, "What
supervisors do").
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MAX_APPLIES = 3
"""Applies of a corrupt delta before it pulls in full."""


class Act(enum.Enum):
    """The next step of a supervisor."""

    PULL = "pulls what the answer names"
    ASK = "asks again"
    FULL_PULL = "pulls the target in full"


@dataclass(frozen=True, slots=True)
class Reaction:
    """The next act, after ``seconds``."""

    act: Act
    seconds: float = 0.0


@dataclass
class Supervisor:
    """One update of one service. ``v2``: it requests rsync deltas, with docker-delta 2.x."""

    v2: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    _failures: int = 0
    _unreachable: int = 0
    _applies: int = 0

    def answered(self, status: int | None) -> Reaction:
        """Returns the reaction to an answer of the delta API; None: no connection."""
        if status is None:
            self._unreachable += 1
            return Reaction(Act.ASK, min(16.0, 2.0 ** (self._unreachable - 1)))
        self._unreachable = 0
        if status in (502, 504):
            # "Still processing": no back-off, and Retry-After is ignored.
            return Reaction(Act.ASK, self.chance.uniform(0.2, 1.0))
        if (300 <= status < 400) if self.v2 else status == 200:
            return Reaction(Act.PULL)
        if status == 401:
            # With the same token, which it keeps for ten minutes.
            return self._backed_off()
        if not self.v2 and 400 <= status < 500:
            return Reaction(Act.FULL_PULL)
        return self._backed_off()

    def pulled(self, status: int | None) -> Reaction:
        """Returns the reaction to a failed pull of the named image: the HTTP status of its
        manifest, or None for a corrupt layer.
        """
        if status is not None:
            # It requests the delta each time, and never pulls in full.
            return self._backed_off()
        self._applies += 1
        return Reaction(Act.FULL_PULL) if self._applies >= MAX_APPLIES else self._backed_off()

    def _backed_off(self) -> Reaction:
        # Measured: 1.2, 2.2, 4.2 … seconds.
        self._failures += 1
        return Reaction(Act.ASK, 2.0 ** (self._failures - 1) + 0.2)


@dataclass
class Fleet:
    """Supervisors that poll one server in a loop, in one event loop. ``speed``: how many times
    faster than real ones; the server's ``hold`` must be divided by the same number.
    """

    url: str
    speed: float = 1.0
    statuses: Counter[int | None] = field(default_factory=Counter)

    def run(self, seconds: float, paths: list[tuple[str, str]]) -> Counter[int | None]:
        """Runs supervisors, one for each path and token. Returns the number of answers by status,
        during this number of scaled seconds.
        """

        async def all_of_them() -> None:
            tasks = [
                asyncio.create_task(self._supervise(path, token, random.Random(number)))
                for number, (path, token) in enumerate(paths)
            ]
            await asyncio.sleep(seconds / self.speed)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(all_of_them())
        return self.statuses

    async def _supervise(self, path: str, token: str, chance: random.Random) -> None:
        supervisor = Supervisor(chance=chance)
        # Devices do not arrive at the same instant.
        await asyncio.sleep(chance.uniform(0, 1) / self.speed)
        while True:
            status = await self._ask(path, token)
            self.statuses[status] += 1
            reaction = supervisor.answered(status)
            if reaction.act is not Act.ASK:
                return
            await asyncio.sleep(reaction.seconds / self.speed)

    async def _ask(self, path: str, token: str) -> int | None:
        host = urlsplit(self.url)
        try:
            reader, writer = await asyncio.open_connection(host.hostname, host.port)
        except OSError:
            return None
        try:
            head = (
                f"GET {path} HTTP/1.1\r\nHost: {host.netloc}\r\nAuthorization: Bearer {token}\r\n"
            )
            writer.write(
                f"{head}User-Agent: Supervisor/15.0.0 (Linux; balenaOS 4.0.0)\r\n\r\n".encode()
            )
            line = await reader.readline()
            return int(line.split()[1]) if line else None
        except OSError:
            return None
        finally:
            writer.close()
