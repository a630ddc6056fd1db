"""The finished layer's gzip, made by libdeflate in members of several MB, on several cores.

Members are cut by the bytes alone, so the result does not depend on the number of threads. Source:
RFC 1952, 2.2 (members).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import deflate


class Hash(Protocol):
    """What hashlib gives."""

    def update(self, data: bytearray, /) -> None:
        """Take more bytes in."""


class Sink(Protocol):
    """A binary file, as far as it is needed here."""

    def write(self, data: bytearray, /) -> object:
        """Write all of it."""


class GzipWriter:
    """Compresses pieces in the pool's threads and writes them in order, hashing what is written.

    Each piece becomes one gzip member; at most ``ahead`` are under way.
    """

    def __init__(
        self, out: Sink, sha256: Hash, pool: ThreadPoolExecutor, level: int, ahead: int
    ) -> None:
        self._out, self._sha256, self._pool, self._level, self._ahead = (
            out,
            sha256,
            pool,
            level,
            ahead,
        )
        self._pending: deque[Future[bytearray]] = deque()
        self.size = 0

    def put(self, piece: bytes | bytearray) -> None:
        """One member's worth. Blocks while enough is under way."""
        self._pending.append(self._pool.submit(deflate.gzip_compress, piece, self._level))
        while len(self._pending) > self._ahead:
            self._write()

    def finish(self) -> None:
        """Write what is under way."""
        while self._pending:
            self._write()

    def _write(self) -> None:
        member = self._pending.popleft().result()
        self._sha256.update(member)
        self._out.write(member)
        self.size += len(member)
