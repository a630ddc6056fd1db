"""Durable file system operations: sync, move into place, hash, remove. Blocking; a full disk
becomes StoreFull.

Nothing here runs on the reactor thread, except if a caller gives a reason.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from obdelta.errors import SizeMismatch, StoreFailed, StoreFull
from obdelta.oci import Digest

_BLOCK = 4096
_FULL = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up"}


@contextlib.contextmanager
def disk_full_as_error() -> Iterator[None]:
    """Turns a full disk into StoreFull; other OSErrors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise error_for_client(error) from error
        raise


def error_for_client(error: OSError) -> StoreFull | StoreFailed:
    """Returns the error that clients get for an unexpected file system error: the only place that
    decides this.

    The text has no path of this machine.
    """
    if error.errno in _FULL:
        return StoreFull(_FULL[error.errno])
    return StoreFailed(error.strerror or type(error).__name__)


def error_for_log(error: OSError) -> str:
    """Returns an error with its path, for the log."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{reason}: {os.fspath(error.filename)!a}"


def sync_file(path: Path) -> int:
    """Syncs a file (fsync) and returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Makes renames and removals in this directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_BOOT = "user.obdelta.boot"


@functools.cache
def _boot_id() -> bytes:
    """Returns the ID of this run of the kernel; one of this process if the kernel gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return secrets.token_bytes(16)


def mark_intact(path: Path) -> None:
    """Marks a file as correct until the system goes down, though perhaps not on the disk yet."""
    with contextlib.suppress(
        OSError
    ):  # a file system without attributes: the file is verified again after a restart
        os.setxattr(path, _BOOT, _boot_id())


def is_marked_intact(path: Path) -> bool:
    """Returns whether the file was marked and the system has not gone down since. Unsynced files
    may lack bytes after that.
    """
    try:
        return os.getxattr(path, _BOOT) == _boot_id()
    except OSError:
        return False


def make_directory(path: Path) -> None:
    """Works like ``mkdir -p``, durable from the first missing parent on."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(0o700, exist_ok=True)
    sync_directory(path.parent)


def move_into_place(tmp: Path, final: Path) -> None:
    """Renames within one file system, durably. The bytes of ``tmp`` must be synced already."""
    make_directory(final.parent)
    tmp.rename(final)
    sync_directory(final.parent)


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a new file (it must not exist). Leaves nothing behind on a full disk."""
    try:
        with disk_full_as_error(), path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except StoreFull:
        path.unlink(missing_ok=True)
        raise


def digest_of(path: Path) -> Digest:
    """Hashes a file in chunks."""
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").hexdigest())


def hashes_to(path: Path, digest: Digest) -> bool:
    """Returns whether a file has this digest; False if it is missing or cannot be read."""
    try:
        return digest_of(path) == digest
    except OSError:
        return False


def check_size(path: Path, size: int, of: str) -> None:
    """Raises SizeMismatch, or FileNotFoundError if there is no such file."""
    actual = path.stat().st_size
    if actual != size:
        raise SizeMismatch(size, actual, of)


def unique_name(suffix: str = "") -> str:
    """Returns a name that no other process or thread generates."""
    return secrets.token_hex(12) + suffix


def has_free_inodes(path: Path) -> bool:
    """Returns whether the file system has an inode left. File systems that count none always
    have.
    """
    found = os.statvfs(path)
    return not found.f_files or found.f_favail > 0


MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def mounts_below(path: Path) -> list[Path]:
    """Returns mount points at or below ``path``, with all links resolved. None without ``/proc``.

    Device numbers do not show bind mounts of the same file system; the kernel's list does.
    Source: proc(5), ``/proc/pid/mountinfo``.
    """
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return []
    top = path.resolve()
    points = (_ESCAPED.sub(lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines)
    found = (Path(os.fsdecode(point)) for point in points)
    return [point for point in found if point == top or top in point.parents]


def remove(path: Path) -> bool:
    """Removes a file or a whole tree, whatever the modes of its directories; links are not
    followed. A missing path is no error.

    Returns False, and removes nothing, if a mount point is at or below ``path``: its files belong
    to others. Directories are moved next to ``path`` first, so that no tree is too deep. A kill
    leaves some of them there: use paths in a directory that is swept at start.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    if not stat.S_ISLNK(status.st_mode) and mounts_below(path):
        return False
    if not stat.S_ISDIR(status.st_mode):
        path.unlink(missing_ok=True)
        return True
    if status.st_dev != path.parent.stat().st_dev:
        return False  # a mount, although /proc is not there to list it
    path.chmod(0o700)
    waiting = [path]
    while waiting:
        directory = waiting.pop()
        with os.scandir(directory) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    hoisted = path.with_name(unique_name(".removed"))
                    Path(entry.path).chmod(0o700)
                    waiting.append(Path(entry.path).rename(hoisted))
                else:
                    Path(entry.path).unlink()
        directory.rmdir()
    return True


def disk_bytes(path: Path) -> int:
    """Returns the approximate disk space of a file or tree in whole blocks; hard links count
    once.
    """
    seen: set[tuple[int, int]] = set()
    total = 0
    waiting = [path]
    while waiting:
        current = waiting.pop()
        try:
            status = current.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            with (
                contextlib.suppress(FileNotFoundError, PermissionError),
                os.scandir(current) as entries,
            ):
                waiting.extend(Path(entry.path) for entry in entries)
        elif status.st_nlink > 1:
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
        # Not st_blocks: that is 0 until the file system writes the file out.
        total += whole_blocks(status.st_size)
    return total


def whole_blocks(size: int) -> int:
    """Returns the approximate disk space of a number of bytes, in whole blocks."""
    return -(-size // _BLOCK) * _BLOCK
