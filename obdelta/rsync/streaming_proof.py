"""Proves a batch while it is still being recorded: applies it to a copy of the base, then compares
with the target.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from obdelta.errors import Cancelled, ProofFailed, WorkerFailed
from obdelta.rsync import batch, proof
from obdelta.rsync.rsync_child import Rsync

_CHUNK = 1 << 18
_TIMEOUT = 5.0
"""Seconds that a stopped thread may take to end."""


class Prover:
    """Applies ``stream`` to ``place`` (made here), a copy of ``base``, in a thread.
    ``report_alive`` gets signs of life.

    The caller reports where the batch begins, how far it has come, and when it is whole, and then
    calls :meth:`check_result`. Leaving the context ends the thread and its rsync at any point. The
    next call raises the thread's errors.
    """

    def __init__(
        self,
        base: Path,
        target: Path,
        place: Path,
        stream: Path,
        report_alive: Callable[[dict[str, Any]], None],
    ) -> None:
        self._base, self._target, self._place, self._stream = base, target, place, stream
        self._report_alive = report_alive
        self._changed = threading.Condition()
        self._begin = self._size = 0
        self._whole = self._stopped = False
        self._error: Exception | None = None
        self._rsync: Rsync | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Prover:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        rsync = self._rsync
        if rsync is not None:
            with contextlib.suppress(ProcessLookupError):
                rsync.process.kill()
        self._thread.join(_TIMEOUT)

    def begin(self, at: int) -> None:
        """Reports that the batch begins at byte ``at`` of the stream, which is there."""
        self._begin = at
        self.follow(at)

    def follow(self, size: int, *, whole: bool = False) -> None:
        """Reports that the stream has ``size`` bytes by now; ``whole`` means that no more will
        come.
        """
        if self._error is not None:
            raise self._error
        with self._changed:
            self._size, self._whole = size, whole
            self._changed.notify()

    def check_result(self) -> float:
        """Compares the result with the target. Returns the seconds since the stream was whole.
        Raises ProofFailed.
        """
        began = time.monotonic()
        self._thread.join()
        if self._error is not None:
            raise self._error
        proof.check_result(self._place, self._target)
        return round(time.monotonic() - began, 3)

    # -- in the thread --

    def _run(self) -> None:
        try:
            proof.copy_for_proof(self._base, self._target, self._place, self._copied)
            self._apply()
        except WorkerFailed as error:
            self._error = ProofFailed("the target", error.why)
        except Exception as error:  # reported to the thread that waits
            self._error = error

    def _copied(self, entries: int) -> None:
        if self._stopped:
            raise Cancelled("the proof was stopped")
        self._report_alive({"busy": entries})

    def _apply(self) -> None:
        with Rsync(batch.apply_command(self._place), stdin=subprocess.PIPE) as rsync:
            self._rsync = rsync
            stdin = cast(IO[bytes], rsync.process.stdin)
            with contextlib.suppress(BrokenPipeError):  # rsync ended early; reported below
                self._feed(stdin)
            with contextlib.suppress(BrokenPipeError):
                stdin.close()
            rsync.check("applying the batch")

    def _feed(self, stdin: IO[bytes]) -> None:
        self._grown(0)
        at = self._begin
        with self._stream.open("rb", buffering=0) as stream:
            while (size := self._grown(at)) > at:
                while at < size:
                    if not (chunk := os.pread(stream.fileno(), min(_CHUNK, size - at), at)):
                        raise ProofFailed("the target", "the stream is shorter than reported")
                    stdin.write(chunk)
                    at += len(chunk)
                    self._report_alive({"busy": at})
                stdin.flush()

    def _grown(self, size: int) -> int:
        """Waits until there are more than ``size`` bytes, or all; returns how many."""
        with self._changed:
            self._changed.wait_for(lambda: self._size > size or self._whole or self._stopped)
            if self._stopped:
                raise Cancelled("the proof was stopped")
            return self._size
