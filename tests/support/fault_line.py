"""A connection to a real registry that cuts, delays and flips bits at positions from a seed.

It is only a double of a bad network: the bytes are the registry's own.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from tests.support.fault_fleet import Tally

FAULTS = ("cut", "slow", "flip")


class BadLine:
    """Listens on ``url``. The registry's bytes get one of the ``FAULTS`` about every ``spacing``
    bytes.
    """

    def __init__(self, registry: str, seed: int, spacing: int, tally: Tally) -> None:
        self._registry = urlsplit(registry)
        self._random, self._spacing, self._tally = random.Random(seed), spacing, tally
        self._lock = threading.Lock()
        self._healed = False
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def restore(self) -> None:
        """Stops making faults."""
        self._healed = True

    def close(self) -> None:
        """Accepts no more connections."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _next(self) -> tuple[str, int]:
        with self._lock:
            return self._random.choice(FAULTS), self._random.randrange(1, 2 * self._spacing)

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(
                (self._registry.hostname or "", self._registry.port or 80)
            ) as registry,
        ):
            threading.Thread(target=_copy, args=(client, registry), daemon=True).start()
            fault, left = self._next()
            with contextlib.suppress(OSError):
                while chunk := registry.recv(16384):
                    if self._healed or left >= len(chunk):
                        left -= len(chunk)
                        client.sendall(chunk)
                        continue
                    self._tally.add(f"upstream: {fault}")
                    if fault == "cut":
                        client.sendall(chunk[:left])
                        break
                    if fault == "slow":
                        for at in range(0, len(chunk), 1024):
                            client.sendall(chunk[at : at + 1024])
                            time.sleep(0.01)  # the fault itself
                    else:
                        spoilt = bytearray(chunk)
                        spoilt[left] ^= 1
                        client.sendall(spoilt)
                    fault, left = self._next()
            for end in (client, registry):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(16384):
            target.sendall(chunk)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def bad_line(registry: str, seed: int, spacing: int, tally: Tally) -> Iterator[BadLine]:
    """Yields a faulty connection for the block."""
    line = BadLine(registry, seed, spacing, tally)
    try:
        yield line
    finally:
        line.close()
