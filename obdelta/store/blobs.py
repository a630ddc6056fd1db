"""Content-addressed files (``blobs/sha256/<first two hex>/<hex>``), and temporary ones (``tmp``).

A file gets such a name only after all its bytes are verified, synced and counted. It never changes
afterwards. Temporary files are in ``<state-dir>/tmp`` on the same file system, which is emptied at
every start.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from twisted.logger import Logger

from obdelta.concurrency.tasks import Threads
from obdelta.errors import DigestMismatch, StoreFull
from obdelta.oci import Digest
from obdelta.store import files, ownership
from obdelta.store.pins import Pin, Pins

log = Logger()

RESERVE = 1 << 20
"""Bytes kept in reserve, so that deltas can be removed on a full disk: the removal writes to the
catalogue before it frees space.
"""

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SHARD = re.compile(r"[0-9a-f]{2}", re.ASCII)


class BlobStore:
    """Stores finished blobs. Creates ``state_dir`` if it is missing; ``threads`` is the pool for
    file work.

    Every coroutine may be cancelled: this ends the wait, while the work in the thread runs to its
    end.
    """

    def __init__(self, state_dir: Path, threads: Threads, *, reserve: int = RESERVE) -> None:
        self.root = state_dir / "blobs" / "sha256"
        self.tmp = state_dir / "tmp"
        self.threads = threads
        self._pins: Pins[Digest] = Pins()
        self._reserve, self._reserved = state_dir / "reserve", reserve
        self._foreign: frozenset[Digest] = frozenset()
        if not state_dir.exists():
            ownership.make(state_dir)
        files.make_directory(self.root)
        files.make_directory(self.tmp)

    # -- look-ups

    def path(self, digest: Digest) -> Path | None:
        """Returns the path of the blob, or None. One ``stat``, cheap enough for the reactor
        thread.
        """
        place = self._place(digest)
        return place if place.is_file() else None

    def size(self, digest: Digest) -> int | None:
        """Returns the size in bytes, or None if the blob is missing. One ``stat``, cheap enough for
        the reactor thread.
        """
        try:
            return self._place(digest).stat().st_size
        except FileNotFoundError:
            return None

    def pin(self, digest: Digest) -> Pin:
        """Protects a blob (also a future one) from removal until the pin is released.

        A build pins the blobs that it adopts until it has published them.
        """
        return self._pins.pin(digest)

    def digests(self) -> Iterator[Digest]:
        """Yields all blobs in no order: regular files in the directory that their names begin with.
        Blocking: call it in a thread.
        """
        for shard in os.scandir(self.root):
            if not _SHARD.fullmatch(shard.name) or not shard.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(shard.path):
                if not _HEX.fullmatch(entry.name) or entry.name[:2] != shard.name:
                    continue
                if entry.is_file(follow_symlinks=False):
                    yield Digest(entry.name)

    # -- additions

    def temporary(self, suffix: str = "") -> Path:
        """Returns an unused name for a new file or directory, without creating it. The caller also
        removes it.
        """
        ownership.make_folder(self.tmp)
        return self.tmp / files.unique_name(suffix)

    async def adopt(self, tmp: Path, digest: Digest, size: int, *, verify: bool = False) -> Path:
        """Moves a temporary file into place as the blob ``digest`` and returns its path. ``tmp`` no
        longer exists afterwards.

        The caller has hashed the bytes as they passed; ``verify`` hashes them once more. Any number
        of callers may adopt the same digest at once. Raises SizeMismatch, DigestMismatch,
        StoreFull.
        """
        return await self.threads.run(self.place, tmp, digest, size, verify=verify)

    async def put(self, content: bytes) -> Digest:
        """Stores bytes from memory (configs, manifests) and returns their digest. Raises
        StoreFull.
        """
        return await self.threads.run(self._put, content)

    def place(self, tmp: Path, digest: Digest, size: int, *, verify: bool = False) -> Path:
        """Does the work of :meth:`adopt` for code that already runs in a thread. Blocking."""
        final = self._place(digest)
        try:
            files.check_size(tmp, size, f"blob {digest}")
            if verify and (actual := files.digest_of(tmp)) != digest:
                raise DigestMismatch(digest, actual, "blob")
            if digest in self._foreign and not files.hashes_to(final, digest):
                # Somebody else's file, whatever its length: it stays, under another name.
                with contextlib.suppress(FileNotFoundError):
                    final.rename(final.with_name(f"{final.name}.{files.unique_name()}"))
            with files.disk_full_as_error():
                if self.size(digest) == size:
                    # Another caller was faster; its rename may not be durable yet.
                    files.sync_directory(final.parent)
                else:
                    files.sync_file(tmp)
                    files.move_into_place(tmp, final)
        finally:
            tmp.unlink(missing_ok=True)
        if not self._reserve.exists():
            self._set_aside()  # there is space again
        return final

    def _put(self, content: bytes) -> Digest:
        digest = Digest.of(content)
        tmp = self.temporary()
        files.write_file(tmp, content)
        self.place(tmp, digest, len(content))
        return digest

    # -- removal

    async def remove(self, digest: Digest) -> bool:
        """Removes a blob; returns False if it is pinned. Open readers can read on. A missing blob
        is no error.
        """
        return await self.threads.run(self.discard, digest)

    def discard(self, digest: Digest) -> bool:
        """Does the work of :meth:`remove` for code that already runs in a thread. Blocking."""
        return self._pins.unless_pinned(digest, lambda: self._place(digest).unlink(missing_ok=True))

    async def sweep(self) -> int:
        """Removes what earlier runs left in ``tmp`` and sets the reserve aside. Returns the number
        of entries removed.

        Call it only at start, when nothing uses ``tmp`` yet. Names that are not ours stay and are
        logged, and so do mount points and entries that hold one.
        """
        removed, left = await self.threads.run(self._sweep)
        ownership.report_swept(self.tmp, removed, left)
        return len(removed)

    async def verified_orphans(self, unknown: Collection[Digest]) -> list[Digest]:
        """Returns the blobs among ``unknown`` (to the catalogue) whose contents match their names.
        Logs the others once: they are not ours, and stay.

        Call it only at start.
        """
        found = await self.threads.run(
            lambda: [one for one in unknown if files.hashes_to(self._place(one), one)]
        )
        self._foreign = frozenset(unknown) - frozenset(found)
        if self._foreign:
            log.warn(
                "start: blobs/ holds {count} files that no delta refers to, and whose contents do"
                " not match their names: {names}: they stay: move them away",
                count=len(self._foreign),
                names=ownership.listing(one.hex for one in self._foreign),
            )
        return found

    def _sweep(self) -> tuple[list[str], list[str]]:
        names = [path.name for path in self.tmp.iterdir()]
        ours = [name for name in names if ownership.TEMPORARY.fullmatch(name)]
        removed = [name for name in ours if files.remove(self.tmp / name)]
        self._set_aside()
        return removed, sorted(set(names) - set(removed))

    async def drop_reserve(self) -> None:
        """Frees the reserve on a full disk, so that the writes that free space can succeed."""
        await self.threads.run(self._reserve.unlink, missing_ok=True)

    async def set_reserve_aside(self) -> None:
        """Allocates the reserve again. Without space there is no reserve, and no error."""
        await self.threads.run(self._set_aside)

    def _set_aside(self) -> None:
        with contextlib.suppress(OSError), self._reserve.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._reserved)
            except OSError:
                self._reserve.unlink()

    async def has_free_space(self) -> bool:
        """Returns whether the reserve exists or can be set aside now, that is, whether
        :data:`RESERVE` bytes are free.
        """
        await self.set_reserve_aside()
        return await self.threads.run(self._reserve.exists)

    async def writable(self) -> bool:
        """Returns whether a small file can be written and synced now (readiness)."""
        return await self.threads.run(self._writable)

    def _writable(self) -> bool:
        try:
            probe = self.temporary()
            try:
                files.write_file(probe, b"obdelta" * 1024)
            finally:
                probe.unlink(missing_ok=True)
        except (OSError, StoreFull):
            return False
        return True

    def _place(self, digest: Digest) -> Path:
        return self.root / digest.hex[:2] / digest.hex
