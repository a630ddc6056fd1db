"""Compresses the finished layer to gzip with libdeflate, in members of several MB, on several
cores.

Only the bytes decide where members are cut, so the result does not depend on the number of threads.
Source: RFC 1952, 2.2 (members).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import deflate


class Hash(Protocol):
    """The interface of hashlib's objects."""

    def update(self, data: bytearray, /) -> None:
        """Hashes more bytes."""


class Sink(Protocol):
    """The method of a binary file that is needed here."""

    def write(self, data: bytearray, /) -> object:
        """Writes all bytes."""


class GzipWriter:
    """Compresses pieces in the pool's threads and writes them in order, hashing the output.

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
        """Adds the content of one member. Blocks while enough members are under way."""
        self._pending.append(self._pool.submit(deflate.gzip_compress, piece, self._level))
        while len(self._pending) > self._ahead:
            self._write()

    def finish(self) -> None:
        """Writes the members that are under way."""
        while self._pending:
            self._write()

    def _write(self) -> None:
        member = self._pending.popleft().result()
        self._sha256.update(member)
        self._out.write(member)
        self.size += len(member)
