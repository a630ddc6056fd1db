"""Growing files: one writer, many readers, and at the end a verified file in its place, or a
failure for all.

Everything that is produced while devices wait for it goes through here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from twisted.python.failure import Failure

from obdelta.concurrency.threads import Threads, shielded
from obdelta.errors import Cancelled, DigestMismatch, SizeMismatch
from obdelta.oci import Digest
from obdelta.store import files
from obdelta.store.blobs import BlobStore
from obdelta.store.growing_file import GrowingFile, OpenFile

T = TypeVar("T")

Publish = Callable[[Path, Digest, int], Path]
"""``(temporary file, digest, size)`` to the final path: syncs and moves, in a thread. The bytes are
verified by then.
"""


def blob_writer(
    blobs: BlobStore, *, length: int | None = None, unverified_tail: int = 0
) -> FileWriter:
    """A spool that becomes a blob."""
    return FileWriter(
        blobs.temporary(".spool"),
        blobs.threads,
        blobs.place,
        length=length,
        unverified_tail=unverified_tail,
    )


class FileWriter(GrowingFile):
    """A file that we write. Whoever writes ends with :meth:`finish` or :meth:`abort`; only then is
    it let go.

    ``tmp`` must not exist. With ``length`` known, more bytes than that are refused, and fewer
    cannot be finished; where it is not ``exact``, the file may end up with another length.
    ``hashed`` elsewhere: whoever writes has compared the digest with which it finishes, and nothing
    is hashed again here. Satisfies the registry's ``Sink``. One call at a time; a cancelled wait
    leaves its call running: then abort.
    """

    def __init__(
        self,
        tmp: Path,
        threads: Threads,
        publish: Publish,
        *,
        length: int | None = None,
        exact: bool = True,
        unverified_tail: int = 0,
        hashed: bool = False,
    ) -> None:
        super().__init__(threads, length=length, unverified_tail=unverified_tail)
        self._tmp, self._publish = tmp, publish
        with files.full_is_clear():
            self._descriptor = os.open(
                tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        self._file = self._own = OpenFile(self._descriptor, threads)
        self._busy = False
        # What threads touch, under the lock: an abort must not overtake a write whose wait was
        # cancelled.
        self._lock = threading.Lock()
        self._expected_length = length if exact else None
        self._hash = None if hashed else hashlib.sha256()
        self._written = 0
        self._closed = False

    @property
    def temporary(self) -> Path:
        """Where the file lies until it is finished or given up."""
        return self._tmp

    async def write(self, chunk: bytes) -> None:
        """Appends; resolves when the chunk is in the file and readers may have it.

        Raises SizeMismatch (more than ``length``), StoreFull: the spool has failed for all then,
        and its file is gone. Cancelled after an abort.
        """
        await self._alone(lambda: self._append(chunk), self._grown)

    async def finish(
        self, expected_digest: Digest | None = None, expected_size: int | None = None
    ) -> Digest:
        """All is written: compares, syncs, moves into place, gives readers what was held back.
        Returns the digest.

        Raises DigestMismatch, SizeMismatch, StoreFull: the spool has failed for all then, and its
        file is gone.
        """
        digest, _ = await self._alone(
            lambda: self._seal(expected_digest, expected_size),
            lambda sealed: self._completed(sealed[1]),
        )
        return digest

    async def abort(self, error: Exception | None = None) -> None:
        """Gives up: readers fail with ``error``, the file is removed. Without effect after the end."""
        reason = Failure(error if error is not None else Cancelled("the file was given up"))

        def discarded(now: bool) -> None:
            if now:
                self._failed(reason)

        await shielded(self._threads.start(self._discard).addCallback(discarded))

    async def _alone(self, function: Callable[[], T], then: Callable[[T], None]) -> T:
        if self._busy:
            raise RuntimeError("a spool takes one call at a time")
        self._busy = True

        def succeeded(outcome: T) -> T:
            self._busy = False
            then(outcome)
            return outcome

        def failed(failure: Failure) -> Failure:
            self._busy = False
            if self.failure is None and not self.complete:
                self._failed(failure)
            return failure

        return await shielded(self._threads.start(function).addCallbacks(succeeded, failed))

    # -- in threads
    # ---------------------------------------------------------------------------------------------

    def _append(self, chunk: bytes) -> int:
        with self._lock:
            self._refuse_closed()
            try:
                size = self._written + len(chunk)
                if self._expected_length is not None and size > self._expected_length:
                    raise SizeMismatch(self._expected_length, size, "file")
                rest = memoryview(chunk)
                with files.full_is_clear():
                    while rest:
                        rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:
                self._close_and_remove()
                raise
            if self._hash is not None:
                self._hash.update(chunk)
            self._written = size
            return size

    def _seal(
        self, expected_digest: Digest | None, expected_size: int | None
    ) -> tuple[Digest, Path]:
        with self._lock:
            self._refuse_closed()
            try:
                for size in (self._expected_length, expected_size):
                    if size is not None and size != self._written:
                        raise SizeMismatch(size, self._written, "file")
                if self._hash is not None:
                    digest = Digest(self._hash.hexdigest())
                elif expected_digest is not None:
                    digest = expected_digest
                else:
                    raise RuntimeError("a spool that does not hash must be told its digest")
                if expected_digest is not None and digest != expected_digest:
                    raise DigestMismatch(expected_digest, digest, "file")
                path = self._publish(self._tmp, digest, self._written)
            except BaseException:
                self._close_and_remove()
                raise
            self._closed = True
            return digest, path

    def _discard(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._close_and_remove()
            return True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Cancelled("the file was given up")

    def _close_and_remove(self) -> None:
        self._closed = True
        self._tmp.unlink(missing_ok=True)


class ExternalFile(GrowingFile):
    """A file that another process writes (rsync, a batch); whoever watches that process tells of
    it.

    The file itself belongs to who watches; it is opened when it has first grown, and may be moved
    or removed after. ``name`` tells one making of it from another. ``rest``: so many bytes will
    still come at most, None while nobody can tell. ``tail``: so many bytes before its end it may be
    filled up, for who was told a length; known when it is complete.
    """

    def __init__(
        self,
        path: Path,
        threads: Threads,
        *,
        length: int | None = None,
        unverified_tail: int = 0,
        name: str = "",
    ) -> None:
        super().__init__(threads, length=length, unverified_tail=unverified_tail)
        self.path: Path = path
        self.name = name
        self.rest: int | None = None
        self.tail = 0

    def bound(self, share: float) -> int | None:
        """A length that it will not exceed, if all that it may fall short of it is at most
        ``share`` of that length.
        """
        if self.rest is None or self.complete or self.failure is not None:
            return None
        length = self.size + self.rest
        return length if self.rest <= share * length else None

    def grew(self, size: int, rest: int | None = None) -> None:
        """It has ``size`` bytes by now, and those will not change. Raises Missing when there is no
        such file.
        """
        self._open()
        if size < self.size:
            raise ValueError("a growing file does not shrink")
        self.rest = rest
        self._grown(size)

    def finished(self, path: Path | None = None) -> None:
        """It is whole and good, and lies at ``path`` now if it was moved. Where its length is not
        the one announced, it fails for all with SizeMismatch.
        """
        if path is not None:
            self.path = path
        size = os.fstat(self._open().descriptor).st_size
        if self.length is not None and size != self.length:
            self._failed(Failure(SizeMismatch(self.length, size, "file")))
            return
        self.size = size
        self._completed(self.path)

    def failed(self, error: Exception) -> None:
        """It will never be whole. Without effect after the end."""
        if not self.complete and self.failure is None:
            self._failed(Failure(error))

    def _open(self) -> OpenFile:
        if self.complete or self.failure is not None:
            raise RuntimeError("the file has ended already")
        if self._own is None:
            self._own = self.use()
        return self._own
