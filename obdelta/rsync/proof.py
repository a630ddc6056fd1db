"""The proof of a batch: copies the base's tree to apply it to, and compares the result with the
target.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from obdelta.errors import ProofFailed
from obdelta.rootfs import compare, fake_super
from obdelta.rootfs.fake_super import StatAttribute
from obdelta.rootfs.tree import listed

_FICLONE = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_REPORTED = 5


def copy_for_proof(
    base: Path, target: Path, out: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Makes ``out`` (it must not exist) a copy of ``base`` that a batch towards ``target`` may be
    applied to.

    Where the file system can, files are cloned. Elsewhere, files whose attributes rsync will not
    touch become hard links to the base's: rsync changes attributes in place, contents never. (Under
    root, few files are of this kind.) ``progress`` gets the number of entries done.
    """
    out.mkdir(mode=0o700)
    descriptors = [os.open(place, _DIRECTORY) for place in (base, out, target)]
    try:
        _Copy(descriptors[1], progress).directory(b"", *descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def check_result(result: Path, target: Path) -> None:
    """Raises ProofFailed, with the first differences, unless ``result`` equals ``target``.

    One difference is allowed, as in open-balena-delta: identical files that are hard-linked only in
    the base stay linked. No container can notice, since writing to a layer's file copies it.
    """
    found = (one for one in compare.differences(result, target) if not _is_kept_hard_link(one))
    if shown := list(islice(found, _MAX_REPORTED + 1)):
        differences = "; ".join(str(one) for one in shown[:_MAX_REPORTED]) + (
            "; …" if len(shown) > _MAX_REPORTED else ""
        )
        raise ProofFailed("the target", differences)


def _is_kept_hard_link(difference: compare.Difference) -> bool:
    return difference.aspect == "links" and difference.expected == os.fsdecode(difference.path)


class _Copy:
    def __init__(self, root: int, progress: Callable[[int], None] | None) -> None:
        self._root, self._progress = root, progress
        self._done = 0
        self._clones = True
        self._copied: dict[
            tuple[int, int], bytes
        ] = {}  # inodes with several names to the first one's path

    def directory(self, path: bytes, base: int, out: int, target: int | None) -> None:
        """Copies one directory with its contents. ``target`` is the directory with the same path,
        if there is one.
        """
        for name, is_directory in listed(base):
            if is_directory:
                self._subdirectory(path + name + b"/", name, base, out, target)
            else:
                self._file(path + name, name, base, out, target)
            self._done += 1
            if self._progress is not None and not self._done % 256:
                self._progress(self._done)
        _copy_attributes(base, out)

    def _subdirectory(
        self, path: bytes, name: bytes, base: int, out: int, target: int | None
    ) -> None:
        os.mkdir(name, 0o700, dir_fd=out)
        opened = [os.open(name, _DIRECTORY, dir_fd=place) for place in (base, out)]
        try:
            if target is not None and _is_directory(name, target):
                opened.append(os.open(name, _DIRECTORY, dir_fd=target))
            self.directory(path, opened[0], opened[1], opened[2] if len(opened) > 2 else None)
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _file(self, path: bytes, name: bytes, base: int, out: int, target: int | None) -> None:
        status = os.stat(name, dir_fd=base, follow_symlinks=False)
        inode = status.st_dev, status.st_ino
        if status.st_nlink > 1 and inode in self._copied:
            os.link(
                self._copied[inode],
                name,
                src_dir_fd=self._root,
                dst_dir_fd=out,
                follow_symlinks=False,
            )
        elif status.st_nlink > 1:
            # The names of one inode may be treated differently by rsync: a copy is always right.
            self._copy(name, base, out, status)
            self._copied[inode] = path
        elif not self._clones and _keeps_attributes(name, status, base, target):
            os.link(name, name, src_dir_fd=base, dst_dir_fd=out, follow_symlinks=False)
        else:
            self._copy(name, base, out, status)

    def _copy(self, name: bytes, base: int, out: int, status: os.stat_result) -> None:
        source = os.open(name, _READ, dir_fd=base)
        try:
            destination = os.open(name, _NEW, 0o600, dir_fd=out)
            try:
                self._content(source, destination, status.st_size)
                _copy_attributes(source, destination)
            finally:
                os.close(destination)
        finally:
            os.close(source)

    def _content(self, source: int, destination: int, size: int) -> None:
        if self._clones:
            try:
                fcntl.ioctl(destination, _FICLONE, source)
                return
            except OSError:
                self._clones = False
        os.ftruncate(destination, size)
        for start, stop in _pieces(source, size):
            os.lseek(destination, start, os.SEEK_SET)
            while start < stop and (sent := os.sendfile(destination, source, start, stop - start)):
                start += sent


def _pieces(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields where a file has data; holes lie between."""
    stop = 0
    while stop < size:
        try:
            start = os.lseek(source, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                return
            raise
        stop = os.lseek(source, start, os.SEEK_HOLE)
        yield start, stop


def _is_directory(name: bytes, parent: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _keeps_attributes(name: bytes, status: os.stat_result, base: int, target: int | None) -> bool:
    """Returns whether rsync leaves this inode's attributes alone: it removes the name, writes
    another file there, or does nothing.
    """
    if target is None:
        return True
    try:
        other = os.stat(name, dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(other.st_mode) or other.st_size != status.st_size:
        return True
    attribute = _attribute_of(name, base)
    if other.st_mtime_ns != status.st_mtime_ns or attribute != _attribute_of(name, target):
        return False
    # rsync removes an attribute that only repeats the file's own mode.
    mode = stat.S_IFREG | attribute.real_mode
    return (attribute.mode, attribute.uid, attribute.gid) != (mode, status.st_uid, status.st_gid)


def _attribute_of(name: bytes, directory: int) -> StatAttribute:
    descriptor = os.open(name, _READ, dir_fd=directory)
    try:
        return StatAttribute.decode(os.getxattr(descriptor, fake_super.NAME))
    finally:
        os.close(descriptor)


def _copy_attributes(source: int, destination: int) -> None:
    StatAttribute.decode(os.getxattr(source, fake_super.NAME)).write(destination)
    mtime = os.fstat(source).st_mtime_ns
    os.utime(destination, ns=(mtime, mtime))
