"""Base of the caches: files and trees by name, least recently used evicted first, never while in
use.

The bookkeeping and every rename (which is quick) happen on the reactor thread. Slow work, syncing
and deleting, happens in threads, on names that nothing else uses. The time of last use is the mtime
of the entry.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

from obdelta.concurrency.tasks import Threads
from obdelta.errors import StoreFull
from obdelta.oci import ChainID, DiffID, Digest
from obdelta.store import files, ownership
from obdelta.store.pins import Pin

FRESH_SECONDS = 60.0
"""Seconds for which a newly adopted entry stays although it is unpinned, so that the code that
added it can pin it.
"""


K = TypeVar("K", bound=Digest | DiffID | ChainID)


async def _no_room(_wanted: int) -> int:
    return 0


@dataclass(slots=True)
class _Entry:
    size: int
    companions: int
    used: float
    fresh_until: float = 0.0
    pins: int = 0


class Cache(Generic[K]):
    """Entries ``<state-dir>/<folder>/<64 hex><suffix>``, files or directories, with companion files
    ``<64 hex><companion suffix>``.

    Other code writes companions while it has the entry pinned. They are counted when the pin is
    released, and removed with the entry. A cache has no limit of its own: the quota over the whole
    store evicts from it.
    """

    folder = ""
    suffix = ""
    durable = True
    """Whether an entry's name must survive a power cut as soon as it was adopted."""
    companion_suffixes: tuple[str, ...] = ()

    def __init__(
        self, state_dir: Path, threads: Threads, clock: Callable[[], float] = time.time
    ) -> None:
        """``clock`` gives seconds since the epoch."""
        self.root = state_dir / self.folder
        self._trash, self._threads, self._clock = state_dir / "tmp", threads, clock
        self._entries: dict[str, _Entry] = {}
        self.on_growth: Callable[[], None] = lambda: None
        """Called after an entry or a companion was added."""
        self.on_release: Callable[[], None] = lambda: None
        """Called after the last pin of an entry was released."""
        self.make_room: Callable[[int], Awaitable[int]] = _no_room
        """Frees a number of bytes when the disk is full; returns the bytes freed."""
        self.steady = clock
        """The clock that measures how long an entry is fresh; the owner may set a monotonic one."""

    @classmethod
    async def open(
        cls, state_dir: Path, threads: Threads, clock: Callable[[], float] = time.time
    ) -> Self:
        """Opens the cache with the entries of earlier runs. Removes companions without an entry.

        Names that are not ours stay and are logged.
        """
        cache = cls(state_dir, threads, clock)
        cache._entries, removed, left = await threads.run(cache._scan)
        ownership.report_swept(cache.root, removed, left)
        return cache

    async def remove(self, key: K) -> None:
        """Removes an entry whose content proved wrong, even while it is in use."""
        if key.hex in self._entries:
            await self._remove(self._detach_entry(key.hex))

    def _scan(self) -> tuple[dict[str, _Entry], list[str], list[str]]:
        files.make_directory(self.root)
        files.make_directory(self._trash)
        pattern = re.compile(rf"([0-9a-f]{{64}}){re.escape(self.suffix)}", re.ASCII)
        top = self.root.resolve()
        mounts = {
            point.relative_to(top).parts[0]
            for point in files.mounts_below(self.root)
            if point != top
        }
        # Neither a link nor what holds a mount is an entry: evicting it would lose another's files.
        found = {
            entry.name: entry.is_symlink() or entry.name in mounts
            for entry in os.scandir(self.root)
        }
        present = found.keys()
        names: list[str] = [
            match[1]
            for name in present
            if not found[name] and (match := pattern.fullmatch(name)) is not None
        ]
        own_names: set[str] = set()
        for name in names:
            own_names.update(path.name for path in (self._path(name), *self._companions(name)))
        orphans = [
            name
            for name in present - own_names
            if self._is_companion(name) and files.remove(self.root / name)
        ]
        entries = {
            name: _Entry(
                files.disk_bytes(self._path(name)),
                self._companion_bytes(name),
                # A clock that was ahead must not keep an entry until that date.
                min(self._path(name).stat().st_mtime, self._clock()),
            )
            for name in names
        }
        return entries, orphans, sorted(present - own_names - set(orphans))

    def _is_companion(self, name: str) -> bool:
        """Returns whether a name is that of a companion, complete or partly written."""
        suffixes = "|".join(map(re.escape, self.companion_suffixes))
        return bool(
            suffixes
            and re.fullmatch(rf"[0-9a-f]{{64}}(?:{suffixes})(?:[0-9a-z_]+\.tmp)?", name, re.ASCII)
        )

    # -- for the quota

    async def usage(self) -> int:
        """Returns the bytes on the disk."""
        return self._usage()

    async def oldest(self) -> float | None:
        """Returns when the next entry to evict was last used; None if none can be evicted."""
        name = self._next()
        return None if name is None else self._entries[name].used

    async def evict_oldest(self) -> int | None:
        """Evicts the least recently used entry. Returns its bytes, None if none can be evicted."""
        name = self._next()
        if name is None:
            return None
        entry = self._entries[name]
        await self._remove(self._detach_entry(name))
        return entry.size + entry.companions

    def temporary(self, suffix: str = "") -> Path:
        """Returns an unused name for a new file, without creating it. Swept at start."""
        ownership.make_folder(self._trash)
        return self._trash / files.unique_name(suffix)

    # -- for subclasses

    def _use(self, name: str) -> Pin | None:
        """Pins an entry and records the time of use; None if the entry is missing."""
        now = self._clock()
        if not self._touch(name, now):
            return None
        entry = self._entries[name]
        entry.used, entry.fresh_until = now, 0.0
        entry.pins += 1
        return Pin(lambda: self._unpin(name, entry))

    async def _adopt(self, tmp: Path, name: str, prepare: Callable[[Path], None]) -> None:
        """Adds ``tmp`` as an entry after ``prepare`` has run in a thread. ``tmp`` no longer exists
        afterwards.

        On a full disk, the quota makes room before StoreFull is raised.
        """
        try:
            size = await self._threads.run(files.disk_bytes, tmp)
            try:
                await self._threads.run(prepare, tmp)
            except StoreFull:
                if not await self.make_room(size):
                    raise
                await self._threads.run(prepare, tmp)
            now = self._clock()
            if not self._touch(name, now):
                os.utime(tmp, (now, now))
                with files.disk_full_as_error():
                    ownership.make_folder(self.root)
                    tmp.rename(self._path(name))
                self._entries[name] = _Entry(size, 0, now)
            entry = self._entries[name]
            entry.used, entry.fresh_until = now, self.steady() + FRESH_SECONDS
        finally:
            await self._threads.run(files.remove, tmp)
        if self.durable:
            await self._threads.run(files.sync_directory, self.root)
        self.on_growth()

    def _enter(self, name: str, size: int) -> None:
        """Records a file that is in place already."""
        now = self._clock()
        self._entries[name] = _Entry(size, 0, now, self.steady() + FRESH_SECONDS)
        self.on_growth()

    # -- internals

    def _touch(self, name: str, now: float) -> bool:
        """Records the time of use on the disk, where a restart finds it. False if the entry is
        missing.
        """
        if name not in self._entries:
            return False
        try:
            os.utime(self._path(name), (now, now))
        except FileNotFoundError:
            # The file was removed by something other than this process.
            del self._entries[name]
            return False
        return True

    def _path(self, name: str) -> Path:
        return self.root / (name + self.suffix)

    def _companions(self, name: str) -> list[Path]:
        return [self.root / (name + suffix) for suffix in self.companion_suffixes]

    def _companion_bytes(self, name: str) -> int:
        return sum(files.disk_bytes(path) for path in self._companions(name))

    def _usage(self) -> int:
        return sum(entry.size + entry.companions for entry in self._entries.values())

    def _next(self) -> str | None:
        now = self.steady()
        free = [
            name
            for name, entry in self._entries.items()
            if not entry.pins and entry.fresh_until <= now
        ]
        return min(free, key=lambda name: self._entries[name].used, default=None)

    def _unpin(self, name: str, entry: _Entry) -> None:
        entry.pins -= 1
        before, entry.companions = entry.companions, self._companion_bytes(name)
        if entry.companions > before:
            self.on_growth()
        elif not entry.pins:
            self.on_release()

    def _detach_entry(self, name: str) -> list[Path]:
        """Takes an entry out at once. Its files move to the trash directory, which a start would
        sweep.
        """
        del self._entries[name]
        taken: list[Path] = []
        for path in (self._path(name), *self._companions(name)):
            trash = self.temporary(".evicted")
            try:
                path.rename(trash)
            except FileNotFoundError:
                continue
            taken.append(trash)
        return taken

    async def _remove(self, taken: list[Path]) -> None:
        await self._threads.run(_remove_all, taken)


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        files.remove(path)
