"""A TCP proxy on loopback that resets connections in the middle of answers, as
mobile networks do.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

_CHUNK = 1 << 14


class Cutter:
    """Forwards ``port`` to the port ``target``. A connection is reset once more bytes than the
    first of ``cuts`` were sent to the client; the next connection uses the next cut. Without cuts
    left, connections are not cut. ``made`` counts cuts, ``connections`` counts connections.
    """

    def __init__(self, target: int, cuts: Sequence[int]) -> None:
        self._target, self._cuts = target, list(cuts)
        self.made = self.connections = 0
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accepts no more connections."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            closing(client),
            closing(socket.create_connection(("127.0.0.1", self._target))) as server,
        ):
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            answered = 0
            with suppress(OSError):
                while chunk := server.recv(_CHUNK):
                    client.sendall(chunk)
                    answered += len(chunk)
                    if self._cuts_at(answered):
                        # With a linger time of 0, closing resets the connection.
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        return

    def _cuts_at(self, answered: int) -> bool:
        with self._lock:
            if not self._cuts or answered <= self._cuts[0]:
                return False
            del self._cuts[0]
            self.made += 1
            return True


def _pump(source: socket.socket, destination: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK):
            destination.sendall(chunk)
        destination.shutdown(socket.SHUT_WR)


@contextmanager
def cutting_answers(target: int, cuts: Sequence[int]) -> Iterator[Cutter]:
    """Yields a proxy for the block."""
    cutter = Cutter(target, cuts)
    try:
        yield cutter
    finally:
        cutter.close()
