"""Commands that are interrupted by a signal."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.commands import OBDELTA, environment

STATUS = {signal.SIGINT: (130, b"obdelta: interrupted\n"), signal.SIGTERM: (143, b"")}


@contextmanager
def silent_server() -> Iterator[tuple[str, threading.Event]]:
    """Runs a server that accepts a request and never answers; the event is set when one has
    arrived.
    """
    requested = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            connection, _ = listening.accept()
            with connection, suppress(ConnectionResetError):
                connection.recv(1)
                requested.set()
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=take)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", requested
        thread.join(30)


@contextmanager
def started(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command whose temporary files are in ``folder/tmp``; at the end the directory must
    be empty.
    """
    (folder / "tmp").mkdir()
    command = [*OBDELTA, *(str(argument) for argument in arguments)]
    pipe = subprocess.PIPE
    inside = environment() | {"TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=inside) as process:
        yield process
    assert [path.name for path in folder.rglob("*")] == ["tmp"]


def assert_ended(process: subprocess.Popen[bytes], sent: signal.Signals) -> None:
    """Sends a signal more often than necessary, and asserts that the command ends."""
    for _ in range(3):
        process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == STATUS[sent]
    assert out == b""
