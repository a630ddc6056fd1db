"""After an OS crash, verifies files that may be corrupt and removes those that are.

Writes of a process that dies still reach the disk. A kernel that dies, or loses power, may lose
unwritten data, and some file systems then return files of the right length with other bytes, even
if synced. A marker file distinguishes the two cases. It names the boot under which a server ran;
its mtime is the last time at which the server still ran.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.concurrency.tasks import Threads
from obdelta.errors import StoreFull
from obdelta.oci import Digest
from obdelta.store import files, ownership

log = Logger()

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Changes with each boot. Source: random(4)."""
REFRESH = 300.0
"""Seconds between two updates of the marker."""
MARGIN = 600.0
"""Files changed later than this many seconds before the marker's last update are verified. By
default kernels write back within a minute.
"""
_HASHED = re.compile(r"([0-9a-f]{64})(?:\.tar|\.blob)?", re.ASCII)
_SHARD = re.compile(r"[0-9a-f]{2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """``checked`` files were read; ``removed`` files and trees were removed."""

    checked: int
    removed: int


class _Markers(NamedTuple):
    """The markers of earlier runs. ``crashed``: markers that an earlier boot left when it crashed;
    ``ended``: names of markers of this ``boot`` whose server has ended. Files changed after
    ``since`` may be corrupt.
    """

    boot: bytes
    crashed: list[Path]
    ended: list[str]
    since: float


class RunMarker:
    """The marker of this server, ``<state-dir>/running-<process id>``."""

    def __init__(self, state_dir: Path, threads: Threads, clock: IReactorTime) -> None:
        self._state_dir, self._threads = state_dir, threads
        self._path = state_dir / f"running-{os.getpid()}"
        self._refresh = LoopingCall(self._touch)
        self._refresh.clock = clock

    async def begin(self, known: Callable[[], Awaitable[Container[Digest]]]) -> VerificationResult:
        """Verifies files that may be corrupt. Call it at the start, before any of them is read.
        Raises StoreFull.

        ``known`` returns the blobs that the catalogue knows, and is called only after a crash.
        Other blobs stay, whatever they hold.
        """
        found = await self._threads.run(self._read_markers)
        blobs: Container[Digest] = await known() if found.crashed else ()
        verified, names = await self._threads.run(self._begin, found, blobs)
        ownership.report_swept(self._state_dir, names)
        if verified.checked or verified.removed:
            log.warn(
                "the operating system crashed while obdelta ran: {checked} files were verified,"
                " {removed} were damaged and removed",
                checked=verified.checked,
                removed=verified.removed,
            )
        self._refresh.start(REFRESH, now=False).addErrback(
            lambda failure: log.failure("the marker of the running server was not updated", failure)
        )
        return verified

    async def end(self) -> None:
        """Removes the marker on an orderly shutdown: no file needs verification."""
        if self._refresh.running:
            self._refresh.stop()
        await self._threads.run(self._path.unlink, missing_ok=True)

    def _touch(self) -> None:
        with contextlib.suppress(
            OSError, StoreFull
        ):  # for example a full disk: more files are verified then
            try:
                os.utime(self._path)
            except FileNotFoundError:
                files.write_file(self._path, boot_id())

    def _read_markers(self) -> _Markers:
        """Reads the markers of earlier runs. Removes those of servers that ended on this boot."""
        boot = boot_id()
        crashed: list[Path] = []
        ended: list[str] = []
        since = 0.0
        for marker in _markers(self._state_dir):
            if marker.read_bytes().strip() != boot:
                found = marker.stat().st_mtime - MARGIN
                since = found if not crashed else min(since, found)
                crashed.append(marker)
            elif not _alive(marker):
                marker.unlink()
                ended.append(marker.name)
        return _Markers(boot, crashed, ended, since)

    def _begin(
        self, found: _Markers, known: Container[Digest]
    ) -> tuple[VerificationResult, list[str]]:
        if self._path not in found.crashed:
            self._path.unlink(missing_ok=True)
            files.write_file(self._path, found.boot)
        verified, names = VerificationResult(0, 0), list[str]()
        if found.crashed:
            verified, names = verify(self._state_dir, found.since, known)
        for marker in found.crashed:
            marker.unlink(missing_ok=True)
        if self._path in found.crashed:
            files.write_file(self._path, found.boot)
        files.sync_directory(self._state_dir)
        return verified, found.ended + [marker.name for marker in found.crashed] + names


def _markers(state_dir: Path) -> list[Path]:
    """Returns the markers of servers: regular files with our names, no links."""
    found = [entry for entry in os.scandir(state_dir) if ownership.RUNNING.fullmatch(entry.name)]
    return sorted(Path(entry.path) for entry in found if entry.is_file(follow_symlinks=False))


def boot_id() -> bytes:
    """Returns the ID of this boot; ``b""``, which matches no other, if the kernel gives none."""
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return b""


def _alive(marker: Path) -> bool:
    pid = marker.name.rpartition("-")[2]
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def verify(
    state_dir: Path, since: float, known: Container[Digest]
) -> tuple[VerificationResult, list[str]]:
    """Hashes every file whose name is its digest and that changed after a time. Removes corrupt
    ones and returns their names. Only ``known`` blobs are verified and removed.

    Trees and match indexes have no digest: those changed since then are removed. Names that are not
    ours stay. Blocking.
    """
    checked = 0
    removed: list[str] = []
    for path in _named(state_dir):
        match = _HASHED.fullmatch(path.name)
        if path.stat(follow_symlinks=False).st_ctime < since:
            continue
        if _SHARD.fullmatch(path.parent.name) and Digest(path.name) not in known:
            continue  # the catalogue does not know it, so another program may have written it
        if match is not None and path.is_file():
            checked += 1
            if files.digest_of(path).hex == match[1]:
                continue
        if files.mounts_below(path):
            continue  # a file system is mounted there: the files are not obdelta's
        trash = state_dir / "tmp" / files.unique_name(".doubtful")
        path.rename(trash)
        files.remove(trash)
        removed.append(f"{path.parent.name}/{path.name}")
    return VerificationResult(checked, len(removed)), removed


def _named(state_dir: Path) -> Iterator[Path]:
    """Yields everything stored under the digest of its contents, and match indexes."""
    blobs = state_dir / "blobs" / "sha256"
    shards = [path for path in blobs.glob("*") if _SHARD.fullmatch(path.name)]
    places = [
        (shard, re.compile(rf"{shard.name}[0-9a-f]{{62}}", re.ASCII)) for shard in sorted(shards)
    ]
    places += [(state_dir / name, _NAMES[name]) for name in _CACHES]
    for folder, names in places:
        if folder.is_dir() and not folder.is_symlink():
            yield from (
                path
                for path in sorted(folder.iterdir())
                if names.fullmatch(path.name) and not path.is_symlink()
            )


_CACHES = ("layers", "trees", "upstream")
_NAMES = {
    "layers": re.compile(r"[0-9a-f]{64}\.(?:tar|idx)", re.ASCII),
    "trees": re.compile(r"[0-9a-f]{64}", re.ASCII),
    "upstream": re.compile(r"[0-9a-f]{64}\.blob", re.ASCII),
}
"""Names that belong to obdelta in each directory; nothing else is touched."""
