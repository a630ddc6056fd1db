"""Estimates the most bytes that a batch will have, while rsync is still writing it.

rsync sends the files of the target whose content differs from the base's file of the same name. A
thread finds these by comparing both trees, and rsync reports which of them it has sent. The files
left can hardly take more bytes in the batch than their size. How well they compress is not known
before.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from obdelta.rootfs.tree import listed

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 20
_BYTES_PER_FILE = 64
"""Bytes that a file costs beside its content: its number, flags, sizes, checksum."""
_SLACK = 1 << 14
"""Bytes that rsync may still hold when it reports a file as done, and the end of the batch."""


class RemainingWork(NamedTuple):
    """The work that rsync has left: ``size`` bytes in ``files`` files."""

    size: int
    files: int

    @property
    def rest(self) -> int:
        """The most bytes of the batch that are still to come. Incompressible content gets a little
        longer.
        """
        return self.size + self.size // 64 + self.files * _BYTES_PER_FILE + _SLACK


class Forecast:
    """The estimate of one batch. Any thread may call :meth:`sent`."""

    def __init__(self, base: Path, target: Path) -> None:
        self._changed: tuple[int, int] | None = None  # bytes and number of files
        self._sent_bytes = self._sent_files = 0
        self._trees = base, target
        self._stopped = False
        self._thread = threading.Thread(target=self._compare, daemon=True)
        self._thread.start()

    def sent(self, size: int) -> None:
        """Records that rsync has sent a file of ``size`` bytes."""
        self._sent_bytes += size
        self._sent_files += 1

    def remaining(self) -> RemainingWork | None:
        """Returns the work that rsync has left; None while the trees are being compared."""
        if self._changed is None:
            return None
        size, files = self._changed
        return RemainingWork(max(0, size - self._sent_bytes), max(0, files - self._sent_files))

    def done(self) -> None:
        """Waits until the trees have been compared."""
        self._thread.join()

    def stop(self) -> None:
        """Stops the comparison; the trees are not read any more when this returns."""
        self._stopped = True
        self._thread.join()

    def _compare(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # no estimate; the code that needs the trees will report the reason
            counted = _Changes(lambda: self._stopped)
            base, target = (os.open(place, _DIRECTORY) for place in self._trees)
            try:
                counted.directory(base, target)
            finally:
                os.close(base)
                os.close(target)
            if not self._stopped:
                self._changed = counted.size, counted.files


class _Changes:
    """Counts the files of a target whose content differs from the base's file of the same name."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.size = self.files = 0
        self._stopped = stopped
        self._linked: set[int] = set()

    def directory(self, base: int | None, target: int) -> None:
        """Counts everything below a directory; ``base`` is the directory with the same path, if
        there is one.
        """
        for name, is_directory in listed(target):
            if self._stopped():
                return
            if is_directory:
                self._below(name, base, target)
                continue
            status = os.stat(name, dir_fd=target, follow_symlinks=False)
            if status.st_nlink > 1:
                if status.st_ino in self._linked:
                    continue
                self._linked.add(status.st_ino)
            if base is None or not _same(name, status.st_size, base, target):
                self.size += status.st_size
                self.files += 1

    def _below(self, name: bytes, base: int | None, target: int) -> None:
        target_directory = os.open(name, _DIRECTORY, dir_fd=target)
        base_directory = None
        try:
            if base is not None:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    base_directory = os.open(name, _DIRECTORY, dir_fd=base)
            self.directory(base_directory, target_directory)
        finally:
            os.close(target_directory)
            if base_directory is not None:
                os.close(base_directory)


def _same(name: bytes, size: int, base: int, target: int) -> bool:
    """Returns whether the base has a file of this name with the same content."""
    try:
        base_file = os.open(name, _READ, dir_fd=base)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(base_file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        target_file = os.open(name, _READ, dir_fd=target)
        try:
            return all(
                os.pread(base_file, _CHUNK, at) == os.pread(target_file, _CHUNK, at)
                for at in range(0, size, _CHUNK)
            )
        finally:
            os.close(target_file)
    finally:
        os.close(base_file)
