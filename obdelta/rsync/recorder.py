"""The child process that records and proves one v2 stream: ``python -m obdelta.rsync.recorder``.

It reads one JSON object from standard input and writes a JSON object a line.

Input::

    {"base": TREE, "target": TREE, "docker_config": {…}|null, "out": FILE,
     "scratch": DIRECTORY, "level": 6, "block": 512, "forecast": bool, "niceness": N}

Output::

    {"size": N, "rest": N|null}
        ``size`` bytes of ``out`` are written and will not change; at most ``rest`` bytes will
        follow ("forecast" requests it). Any number of these lines.
    {"recorded": {"size", "sha256", "tail", "sent_index", "entries", "seconds", "shares"}}
        The whole stream is written (:mod:`obdelta.rsync.file_costs` describes "shares").
    {"busy": N}
        A sign of life while the stream is proven.
    {"proven": {"seconds"}}
        The last line after success; ``scratch`` is yet to be removed.
    {"error": {"type": "BatchInvalid"|"ProofFailed"|"StoreFull"|"WorkerFailed", "why": …}}

It leads its own process group, so that killing the group kills all of it. When standard input ends,
it ends, and its rsync with it. ``scratch`` (made and removed here) is on the file system of the
trees; after a kill, the parent removes the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from obdelta.concurrency.stray_signals import ignore_stray_signals
from obdelta.errors import ObdeltaError, StoreFull, WorkerFailed
from obdelta.rsync import batch, remote_shell, size_estimate
from obdelta.rsync.file_costs import FileCosts
from obdelta.rsync.rsync_child import Rsync
from obdelta.rsync.streaming_proof import Prover

Json = dict[str, Any]

_PIPE = 1 << 20
_PAUSE = 10
"""Milliseconds."""
_TICK = 1000
"""Milliseconds between checks of a silent child."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Job(NamedTuple):
    """The job that standard input describes."""

    base: Path
    target: Path
    docker_config: Json | None
    out: Path
    scratch: Path
    tuning: batch.Tuning
    forecast: bool

    @classmethod
    def parse(cls, value: Json) -> Job:
        """Parses the JSON object."""
        return cls(
            Path(value["base"]),
            Path(value["target"]),
            value["docker_config"],
            Path(value["out"]),
            Path(value["scratch"]),
            batch.Tuning(value["level"], value["block"]),
            value["forecast"],
        )

    def tidied(self, output: str) -> str:
        """Returns rsync's output without this machine's paths."""
        for path, name in ((self.scratch, "scratch"), (self.base, "base"), (self.target, "target")):
            output = output.replace(str(path), name)
        return output


_output_lock = threading.Lock()


def _report(value: Json) -> None:
    with _output_lock:
        sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
        sys.stdout.flush()


class _Out:
    """The growing file, hashed on the way. ``size`` in bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """Appends a piece."""
        remaining = memoryview(piece)
        while remaining:
            remaining = remaining[self._file.write(remaining) :]
        self._hash.update(piece)
        self.size += len(piece)

    def close(self) -> str:
        """Closes the file and returns the digest's hex."""
        self._file.close()
        return self._hash.hexdigest()


def record(job: Job, prover: Prover) -> None:
    """Has rsync write the batch into ``out``, while the prover follows."""
    began = time.monotonic()
    header = batch.stream_header(job.docker_config)
    pipe = job.scratch / "batch"
    os.mkfifo(pipe, 0o600)
    # Opened for reading first: rsync opens it for writing, and must not wait for that.
    source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    out, recording = _Out(job.out), batch.Recording()
    shares = FileCosts(recording.transfers)
    out.write(header)
    prover.begin(len(header))
    reported: tuple[int, int | None] = (out.size, None)
    _report({"size": out.size, "rest": None})
    shell = (sys.executable, "-I", "-S", remote_shell.__file__)
    command = batch.record_command(pipe, job.target, shell, job.tuning)
    forecast = size_estimate.Forecast(job.base, job.target) if job.forecast else None

    def sent(word: batch.ReportedFile) -> None:
        shares.sent(word)
        if forecast is not None:
            forecast.sent(word.size)

    try:
        with Rsync(command, base=job.base, sent=sent) as rsync:
            remaining: size_estimate.RemainingWork | None = None
            for chunk in _chunks(source, rsync.ended):
                out.write(recording.feed(chunk))
                shares.join()
                rest = remaining.rest if remaining is not None and recording.listed else None
                if (out.size, rest) != reported:
                    prover.follow(out.size)
                    reported = out.size, rest
                    _report({"size": out.size, "rest": rest})
                # A file that rsync has reported as sent is in the pipe by now: it counts when that
                # has been read.
                remaining = forecast.remaining() if forecast is not None else None
            rsync.check("writing the batch")
    finally:
        os.close(source)
        if forecast is not None:
            forecast.stop()
    out.write(recording.finish())
    digest = out.close()
    prover.follow(out.size, whole=True)
    _report({"size": out.size, "rest": 0})
    recorded = {
        "size": out.size,
        "sha256": digest,
        "tail": recording.tail,
        "sent_index": None if recording.transfers.unreadable else recording.transfers.sent_index,
        "entries": recording.entries,
        "seconds": round(time.monotonic() - began, 3),
        "shares": None
        if (file_shares := shares.totals()) is None
        else {"head": recording.head} | file_shares,
    }
    _report({"recorded": recorded})


def _chunks(source: int, ended: int) -> Iterator[bytes]:
    """Yields the output of a pipe until its writer's process has ended, and nothing every second
    without output.

    rsync writes a few bytes at a time. The pipe is large enough for all that it writes within a
    pause, which is then read at once.
    """
    with contextlib.suppress(
        OSError
    ):  # an ordinary user may be over a limit: then rsync waits a little more often
        fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, _PIPE)
    both, end = select.poll(), select.poll()
    both.register(source, select.POLLIN)
    for poll in (both, end):
        poll.register(ended, select.POLLIN)
    while ended not in (ready := {descriptor for descriptor, _ in both.poll(_TICK)}):
        if not ready:
            yield b""
            continue
        end.poll(_PAUSE)
        chunk = _read(source)
        if not chunk:  # every writer has closed it
            end.poll()
        yield chunk
    while chunk := _read(source):
        yield chunk


def _read(source: int) -> bytes:
    try:
        return os.read(source, _PIPE)
    except BlockingIOError:
        return b""


def _error(error: Exception, job: Job) -> Json:
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        error = StoreFull("no space left")
    elif not isinstance(error, ObdeltaError):
        # An OSError's own text has paths of this machine in it.
        why = error.strerror if isinstance(error, OSError) else str(error)
        error = WorkerFailed(f"{type(error).__name__}: {why}")
    return {"type": type(error).__name__, "why": job.tidied(getattr(error, "why", str(error)))}


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Runs one job. The exit status is 0 when the stream was recorded and proven; otherwise this
    ends by SIGKILL.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    ignore_stray_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and tidy up on the way
    request = json.loads(sys.stdin.readline())
    if request.get("parent", os.getppid()) != os.getppid():
        return 1  # the parent is gone, and another server may use the files by now
    os.nice(request["niceness"])
    job = Job.parse(request)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.scratch.mkdir(mode=0o700)
    proven = False
    try:
        with Prover(job.base, job.target, job.scratch / "proof", job.out, _report) as prover:
            record(job, prover)
            seconds = prover.check_result()
        proven = True
        _report({"proven": {"seconds": seconds}})
    except Exception as error:  # any error is the answer
        _report({"error": _error(error, job)})
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(job.scratch)
        if not proven:
            os.killpg(0, signal.SIGKILL)  # with any rsync that is left
    return 0


if __name__ == "__main__":
    sys.exit(main())
