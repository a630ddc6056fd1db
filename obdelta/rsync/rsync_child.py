"""rsync as a child of the recorder: starts it with a minimal environment, keeps its output and
ensures that it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from obdelta.errors import WorkerFailed
from obdelta.rsync import batch, remote_shell

_MAX_STDERR = 2000
_TIMEOUT = 2.0
"""Seconds for steps that should take no time."""


class Rsync:
    """A running rsync. Its errors are kept, up to a limit; it has ended when this context is left.

    ``base`` is the tree for the remote side. ``parse_sent_file`` gets, in a thread, each file that
    rsync reports as sent; it has got all of them when :meth:`check` returns.
    """

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int = subprocess.DEVNULL,
        base: Path | None = None,
        sent: Callable[[batch.ReportedFile], None] | None = None,
    ) -> None:
        environment = {
            name: os.environ[name]
            for name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH")
            if name in os.environ
        }
        environment["LC_ALL"] = "C"
        if base is not None:
            environment[remote_shell.BASE] = f"{base}/"
        try:
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.DEVNULL if sent is None else subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
            )
        except FileNotFoundError as error:
            raise WorkerFailed("there is no rsync on this machine") from error
        self.ended = os.pidfd_open(self.process.pid)
        self._errors = ""
        self._listener = threading.Thread(
            target=self._listen, args=(self.process.stderr,), daemon=True
        )
        self._listener.start()
        self._stdout_reader: threading.Thread | None = None
        if sent is not None:
            self._stdout_reader = threading.Thread(
                target=_read_stdout, args=(self.process.stdout, sent), daemon=True
            )
            self._stdout_reader.start()

    def __enter__(self) -> Rsync:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            if threading.current_thread() is threading.main_thread():
                # To all processes of this process group, as none should write while their directory
                # is removed.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.killpg(0, signal.SIGTERM)
            else:
                self.process.terminate()
            try:
                self.process.wait(_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self.ended)

    def _listen(self, stderr: IO[bytes]) -> None:
        for line in stderr:
            self._errors = (self._errors + line.decode("utf-8", "replace"))[-_MAX_STDERR:]

    def check(self, doing: str) -> None:
        """Waits for the end. Raises WorkerFailed with rsync's output unless it ended well."""
        status = self.process.wait()
        self._listener.join(_TIMEOUT)  # a child of its own might still hold the pipe
        if self._stdout_reader is not None:
            self._stdout_reader.join(_TIMEOUT)
        if status:
            errors = " ".join(self._errors.split())
            raise WorkerFailed(f"rsync ended with status {status} while it was {doing}: {errors}")


def _read_stdout(stdout: IO[bytes], sent: Callable[[batch.ReportedFile], None]) -> None:
    for line in stdout:
        if (word := batch.parse_sent_file(line)) is not None:
            sent(word)
