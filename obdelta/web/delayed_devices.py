"""Devices whose supervisor takes a v2 delta only with a delay, for operators to know of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

REMEMBERED_SECONDS = 86400.0
MOST = 100_000
"""Devices that are remembered: the oldest one is forgotten then."""


class DelayedDevices:
    """Counts the clients that asked within a day. ``seconds`` gives monotonic time."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._asked: OrderedDict[str, float] = OrderedDict()

    def asked(self, client: str) -> None:
        """Notes that a client asked."""
        self._asked[client] = self._seconds()
        self._asked.move_to_end(client)
        self._expire()

    def note(self) -> str:
        """Returns a line for operators, empty where there is nothing to say."""
        self._expire()
        count = len(self._asked)
        if not count:
            return ""
        devices = "1 device asks" if count == 1 else f"{count:,} devices ask"
        return (
            f"{devices} for v2 with a supervisor that applies it only with a delay:"
            " set BALENA_SUPERVISOR_DELTA_VERSION=3"
        )

    def _expire(self) -> None:
        oldest = self._seconds() - REMEMBERED_SECONDS
        while self._asked and (
            len(self._asked) > MOST or next(iter(self._asked.values())) <= oldest
        ):
            self._asked.popitem(last=False)
