"""Counts devices whose supervisor applies a v2 delta only with a delay, for a note to operators."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

REMEMBERED_SECONDS = 86400.0
MOST = 100_000
"""Maximum number of devices remembered; the oldest is forgotten first."""


class DelayedDevices:
    """Counts the clients that sent a request within a day. ``seconds`` returns monotonic time."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._last_request: OrderedDict[str, float] = OrderedDict()

    def asked(self, client: str) -> None:
        """Records a request of a client."""
        self._last_request[client] = self._seconds()
        self._last_request.move_to_end(client)
        self._expire()

    def note(self) -> str:
        """Returns one line for operators, or an empty string if there are no such devices."""
        self._expire()
        count = len(self._last_request)
        if not count:
            return ""
        devices = "1 device asks" if count == 1 else f"{count:,} devices ask"
        return (
            f"{devices} for v2 with a supervisor that applies it only with a delay:"
            " set BALENA_SUPERVISOR_DELTA_VERSION=3"
        )

    def _expire(self) -> None:
        oldest = self._seconds() - REMEMBERED_SECONDS
        while self._last_request and (
            len(self._last_request) > MOST or next(iter(self._last_request.values())) <= oldest
        ):
            self._last_request.popitem(last=False)
