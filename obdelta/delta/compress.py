"""Compresses the finished layer, on several cores: to gzip with libdeflate, in members of several
MB, or to one zstd frame. Another thread can read the file meanwhile.

Only the bytes decide where members are cut, so the result does not depend on the number of threads.
zstd cuts its jobs by the window only, also if there is one thread.
Sources: RFC 1952, 2.2 (members); RFC 8878, 3.1.1 (frames).
"""

from __future__ import annotations

import abc
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import deflate
import zstandard

from obdelta.oci import Form

MB = 1024 * 1024
SMALLEST_MEMBER, MEMBER = 2 * MB, 4 * MB
PIECES = 4
"""A gzip member holds this fraction of the tar, within these sizes, so that several cores can
compress.
"""
SMALL = 64 * 1024
"""Pieces of at most this size are compressed at once: another thread costs more than it saves."""
ZSTD_THREADS = 4
"""Maximum number of zstd's threads: each has tables and a job of 8 MB in the worker process's
memory.
"""
ZSTD_WINDOW_LOG = 21
"""The window is 2 MiB: an engine allocates the declared size. A larger one saves 1 % at most."""


def member_size(tar_size: int) -> int:
    """Returns how many bytes of a tar become one gzip member."""
    return min(max(tar_size // PIECES, SMALLEST_MEMBER), MEMBER)


class Hash(Protocol):
    """The interface of hashlib's objects."""

    def update(self, data: bytes | bytearray, /) -> None:
        """Hashes more bytes."""


class Sink(Protocol):
    """The method of a binary file that is needed here."""

    def write(self, data: bytes | bytearray, /) -> object:
        """Writes all bytes."""


class Writer(abc.ABC):
    """Compresses pieces to ``out``, hashing what it writes. ``size`` counts the bytes written so
    far.
    """

    def __init__(self, out: Sink, sha256: Hash) -> None:
        self._out, self._sha256 = out, sha256
        self.size = 0

    @abc.abstractmethod
    def put(self, piece: bytes | bytearray) -> None:
        """Adds a piece. Blocks while enough of them are under way."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Writes what is still under way."""

    def _write(self, compressed: bytes | bytearray) -> None:
        self._sha256.update(compressed)
        self._out.write(compressed)
        self.size += len(compressed)


class GzipWriter(Writer):
    """Compresses pieces in the pool's threads and writes them in order.

    Each piece becomes one gzip member; at most ``ahead`` are under way.
    """

    def __init__(
        self, out: Sink, sha256: Hash, pool: ThreadPoolExecutor, level: int, ahead: int
    ) -> None:
        super().__init__(out, sha256)
        self._pool, self._level, self._ahead = pool, level, ahead
        self._pending: deque[Future[bytearray]] = deque()

    def put(self, piece: bytes | bytearray) -> None:
        """Adds the content of one member. Blocks while enough members are under way."""
        if len(piece) <= SMALL and not self._pending:
            self._write(deflate.gzip_compress(piece, self._level))
            return
        self._pending.append(self._pool.submit(deflate.gzip_compress, piece, self._level))
        while len(self._pending) > self._ahead:
            self._write(self._pending.popleft().result())

    def finish(self) -> None:
        """Writes the members that are under way."""
        while self._pending:
            self._write(self._pending.popleft().result())


class ZstdWriter(Writer):
    """Compresses ``content_size`` bytes to one frame with that size and a checksum.

    ``search``: zstd's search parameters. ``threads`` are zstd's own.
    """

    def __init__(
        self,
        out: Sink,
        sha256: Hash,
        content_size: int,
        search: Mapping[str, int],
        threads: int,
    ) -> None:
        super().__init__(out, sha256)
        parameters = zstandard.ZstdCompressionParameters(
            **search,
            window_log=ZSTD_WINDOW_LOG,
            write_content_size=True,
            write_checksum=True,
            # Without threads zstd cuts no jobs, and the bytes differ.
            threads=min(max(1, threads), ZSTD_THREADS),
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._frame = compressor.compressobj(size=content_size)

    def put(self, piece: bytes | bytearray) -> None:
        """Adds bytes of the content. Blocks while enough of them are under way."""
        self._write(self._frame.compress(piece))

    def finish(self) -> None:
        """Ends the frame. Raises ZstdError unless exactly the announced size was put."""
        self._write(self._frame.flush())


@dataclass(frozen=True, slots=True)
class Compression:
    """The compression of one layer: where its bytes go, and with what. ``parameters``: those of
    the effort and form (:attr:`obdelta.delta.effort.Tuning.compression`).
    """

    out: Sink
    sha256: Hash
    tar_size: int
    parameters: Mapping[str, int]
    pool: ThreadPoolExecutor
    threads: int


WRITERS: Mapping[Form, Callable[[Compression], Writer]] = {
    Form.GZIP: lambda of: GzipWriter(
        of.out, of.sha256, of.pool, of.parameters["level"], 2 * of.threads
    ),
    Form.ZSTD: lambda of: ZstdWriter(of.out, of.sha256, of.tar_size, of.parameters, of.threads),
}
"""The compressor of each form."""


class TailFile:
    """A new file. One thread calls :meth:`write` and then :meth:`end`, another :meth:`read`. A
    context manager, which closes the file: the reader must be done by then.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._changed = threading.Condition()
        self._size = self._position = 0
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, content: bytes | bytearray) -> None:
        """Appends all bytes."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        with self._changed:
            self._size += len(content)
            self._changed.notify()

    def end(self) -> None:
        """Declares the file complete."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def read(self, most: int, /) -> bytes:
        """Returns up to ``most`` of the next bytes; waits if there are none yet. Empty at the
        end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._position < self._size)
            ready = self._size - self._position
        chunk = os.pread(self._file.fileno(), min(most, ready), self._position)
        self._position += len(chunk)
        return chunk
