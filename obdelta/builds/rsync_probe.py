"""Check that rsync can be run: v2 deltas need it, and no v2 build begins without it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from twisted.internet.defer import ensureDeferred

from obdelta.concurrency.threads import Threads
from obdelta.oci import shown

GOOD_SECONDS, BAD_SECONDS = 60.0, 5.0
"""Seconds for which a good and a bad answer are valid."""
_PATIENCE = 10.0
"""Seconds for a call that takes some milliseconds."""
_REST = (
    "v2 is answered with full pulls: install rsync 3.2 or newer, and see that this user may run it"
)


def why_unusable(rsync: str = "rsync") -> str | None:
    """Runs ``rsync --version`` and returns the problem, None if there is none. Blocking."""
    try:
        ran = subprocess.run(
            [rsync, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        return f"rsync is missing: {_REST}"
    except subprocess.TimeoutExpired:
        return f"rsync did not answer within {_PATIENCE:g} seconds: {_REST}"
    except OSError as error:
        return f"rsync cannot be started: {shown((error.strerror or '').encode())}: {_REST}"
    if ran.returncode < 0:
        return f"rsync was killed by signal {-ran.returncode}: {_REST}"
    if ran.returncode:
        return f"rsync ended with status {ran.returncode}: {_REST}"
    return None


class RsyncProbe:
    """Repeats the check when its result is old. ``seconds`` gives monotonic time."""

    def __init__(self, threads: Threads, seconds: Callable[[], float]) -> None:
        self._threads, self._seconds = threads, seconds
        self._found: str | None = None
        self._until = float("-inf")

    async def problem(self) -> str | None:
        """Returns the problem with rsync in one line; None if there is none."""
        if self._seconds() >= self._until:
            self._found = await self._threads.run(why_unusable)
            self._until = self._seconds() + (GOOD_SECONDS if self._found is None else BAD_SECONDS)
        return self._found

    def note(self) -> str:
        """Returns the last known problem, for operators; empty if there was none."""
        if self._seconds() >= self._until:
            # Stopping the server cancels it.
            ensureDeferred(self.problem()).addErrback(lambda _: None)
        return self._found or ""
