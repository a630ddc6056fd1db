"""The child process that makes and proves one v2 stream: ``python -m obdelta.rsync.recorder``.

It reads one JSON object from standard input and writes a JSON object a line:

    in   {"base": TREE, "target": TREE, "docker_config": {…}|null, "out": FILE, "scratch":
    DIRECTORY, "level": 6, "block": 512,
          "forecast": bool, "niceness": N}
    out  {"size": N, "rest": N|null}                         so much of ``out`` is there and will
    not change, and so much
                                                             will come at most (asked for by
                                                             "forecast"); any number of them
         {"recorded": {"size", "sha256", "tail", "sent_index", "entries", "seconds", "shares"}}
         all of it; obdelta.rsync.file_costs {"busy": N}
         signs of life while it is proven {"proven": {"seconds"}}                             the
         last line when all went well; ``scratch`` is yet to be removed {"error": {"type":
         "BatchInvalid"|"ProofFailed"|"StoreFull"|"WorkerFailed", "why": …}}

It leads a process group of its own: who kills it kills the group. When standard input ends, it
ends, and its rsync with it. ``scratch`` (made and removed here) is on the file system of the trees;
what is left after a kill is the parent's to remove.
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
from obdelta.rsync.file_costs import Shares
from obdelta.rsync.rsync_child import Rsync
from obdelta.rsync.streaming_proof import Prover

Json = dict[str, Any]

_PIPE = 1 << 20
_PAUSE = 10
"""Milliseconds."""
_TICK = 1000
"""Milliseconds between looks at a child that says nothing."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Job(NamedTuple):
    """What standard input asks for."""

    base: Path
    target: Path
    docker_config: Json | None
    out: Path
    scratch: Path
    tuning: batch.Tuning
    forecast: bool

    @classmethod
    def parse(cls, value: Json) -> Job:
        """From the JSON object."""
        return cls(
            Path(value["base"]),
            Path(value["target"]),
            value["docker_config"],
            Path(value["out"]),
            Path(value["scratch"]),
            batch.Tuning(value["level"], value["block"]),
            value["forecast"],
        )

    def tidied(self, said: str) -> str:
        """What rsync said, without this machine's paths."""
        for path, name in ((self.scratch, "scratch"), (self.base, "base"), (self.target, "target")):
            said = said.replace(str(path), name)
        return said


_telling = threading.Lock()


def _tell(value: Json) -> None:
    with _telling:
        sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
        sys.stdout.flush()


class _Out:
    """The file that grows, hashed on the way. ``size`` in bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """Appends."""
        left = memoryview(piece)
        while left:
            left = left[self._file.write(left) :]
        self._hash.update(piece)
        self.size += len(piece)

    def close(self) -> str:
        """The digest's hex."""
        self._file.close()
        return self._hash.hexdigest()


def record(job: Job, prover: Prover) -> None:
    """Has rsync write the batch into ``out``, and the prover follow."""
    began = time.monotonic()
    header = batch.stream_header(job.docker_config)
    pipe = job.scratch / "batch"
    os.mkfifo(pipe, 0o600)
    # Opened for reading first: rsync's opening it for writing must not wait for us.
    source = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    out, recording = _Out(job.out), batch.Recording()
    shares = Shares(recording.transfers)
    out.write(header)
    prover.begin(len(header))
    told: tuple[int, int | None] = (out.size, None)
    _tell({"size": out.size, "rest": None})
    shell = (sys.executable, "-I", "-S", remote_shell.__file__)
    command = batch.record_command(pipe, job.target, shell, job.tuning)
    forecast = size_estimate.Forecast(job.base, job.target) if job.forecast else None

    def sent(word: batch.Sent) -> None:
        shares.sent(word)
        if forecast is not None:
            forecast.sent(word.size)

    try:
        with Rsync(command, base=job.base, sent=sent) as rsync:
            left: size_estimate.Left | None = None
            for chunk in _chunks(source, rsync.ended):
                out.write(recording.feed(chunk))
                shares.join()
                rest = left.rest if left is not None and recording.listed else None
                if (out.size, rest) != told:
                    prover.follow(out.size)
                    told = out.size, rest
                    _tell({"size": out.size, "rest": rest})
                # What rsync says to have sent by now is in the pipe: it counts when that has been
                # read.
                left = forecast.left() if forecast is not None else None
            rsync.check("writing the batch")
    finally:
        os.close(source)
        if forecast is not None:
            forecast.stop()
    out.write(recording.finish())
    digest = out.close()
    prover.follow(out.size, whole=True)
    _tell({"size": out.size, "rest": 0})
    recorded = {
        "size": out.size,
        "sha256": digest,
        "tail": recording.tail,
        "sent_index": None if recording.transfers.unreadable else recording.transfers.sent_index,
        "entries": recording.entries,
        "seconds": round(time.monotonic() - began, 3),
        "shares": None
        if (told_shares := shares.told()) is None
        else {"head": recording.head} | told_shares,
    }
    _tell({"recorded": recorded})


def _chunks(source: int, ended: int) -> Iterator[bytes]:
    """What comes out of a pipe until its writer's process has ended, and nothing every second in
    which nothing comes.

    rsync writes by the few bytes: what it wrote within a pause is read at once, and the pipe is
    made large enough for that.
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
    """One job. The exit status is 0 when the stream was made and proven; otherwise this ends by
    SIGKILL.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    ignore_stray_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and tidy up on the way
    asked = json.loads(sys.stdin.readline())
    if asked.get("parent", os.getppid()) != os.getppid():
        return 1  # who asked is gone, and another server may use the files by now
    os.nice(asked["niceness"])
    job = Job.parse(asked)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.scratch.mkdir(mode=0o700)
    proven = False
    try:
        with Prover(job.base, job.target, job.scratch / "proof", job.out, _tell) as prover:
            record(job, prover)
            seconds = prover.judge()
        proven = True
        _tell({"proven": {"seconds": seconds}})
    except Exception as error:  # whatever it is, it is the answer
        _tell({"error": _error(error, job)})
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(job.scratch)
        if not proven:
            os.killpg(0, signal.SIGKILL)  # with whatever rsync may have left behind
    return 0


if __name__ == "__main__":
    sys.exit(main())
