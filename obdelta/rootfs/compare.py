"""Compares two root filesystems entry by entry: real ones (root's) or trees with ``--fake-super``
attributes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from obdelta.rootfs import fake_super
from obdelta.rootfs.fake_super import StatAttribute
from obdelta.rootfs.tree import listed

Aspect = Literal[
    "missing",
    "extra",
    "type",
    "mode",
    "owner",
    "device",
    "mtime",
    "target",
    "size",
    "content",
    "links",
]

_CHUNK = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
}


class Difference(NamedTuple):
    """One difference. ``path`` is below the root (``b""`` is the root itself); ``actual`` and
    ``expected`` are text for people.
    """

    path: bytes
    aspect: Aspect
    actual: str = ""
    expected: str = ""

    def __str__(self) -> str:
        values = (
            f": {self.actual}, expected {self.expected}" if self.actual or self.expected else ""
        )
        return f"{os.fsdecode(self.path)!a} {self.aspect}{values}"


def differences(
    actual: Path, expected: Path, *, actual_fake: bool = True, expected_fake: bool = True
) -> Iterator[Difference]:
    """Yields the differences of ``actual`` from ``expected``, in the order of names.

    Compared are names, types, modes, owners, device numbers, mtimes (of directories only the whole
    seconds: rsync keeps no more), targets of symbolic links, contents, and hard links between
    names. ``actual_fake`` and ``expected_fake`` select the trees that are read as rsync's
    ``--fake-super`` does. Contents of files that are the same inode are not read.
    """
    with _Side.opened(actual, actual_fake) as one, _Side.opened(expected, expected_fake) as other:
        yield from _compare(b"", one.root(), other.root(), one, other)


@dataclass
class _Side:
    """One tree. ``leaders`` has the first name of each inode that has several."""

    descriptor: int
    fake: bool
    leaders: dict[tuple[int, int], bytes] = field(default_factory=dict)

    @classmethod
    def opened(cls, root: Path, fake: bool) -> _Side:
        return cls(os.open(root, _OPEN | os.O_DIRECTORY), fake)

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def root(self) -> _Entry:
        return self.entry(b".", self.descriptor)

    def entry(self, name: bytes, directory: int) -> _Entry:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        attribute = StatAttribute.of(status)
        if self.fake and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            descriptor = os.open(name, _OPEN, dir_fd=directory)
            try:
                attribute = _attribute(descriptor) or attribute
            finally:
                os.close(descriptor)
        return _Entry(name, directory, status, attribute)

    def leader(self, entry: _Entry, path: bytes) -> bytes:
        if entry.status.st_nlink < 2:
            return path
        return self.leaders.setdefault((entry.status.st_dev, entry.status.st_ino), path)


class _Entry(NamedTuple):
    name: bytes
    directory: int
    status: os.stat_result
    attribute: StatAttribute

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.attribute.mode)

    def open(self, flags: int = 0) -> int:
        return os.open(self.name, _OPEN | flags, dir_fd=self.directory)

    def target(self) -> bytes:
        """Returns a symbolic link's target."""
        if stat.S_ISLNK(self.status.st_mode):
            return os.readlink(self.name, dir_fd=self.directory)
        descriptor = self.open()
        try:
            return os.pread(descriptor, 1 << 13, 0)
        finally:
            os.close(descriptor)


def _attribute(descriptor: int) -> StatAttribute | None:
    try:
        return StatAttribute.decode(os.getxattr(descriptor, fake_super.NAME))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise


def _compare(
    path: bytes, actual: _Entry, expected: _Entry, one: _Side, other: _Side
) -> Iterator[Difference]:
    if actual.type != expected.type:
        yield Difference(path, "type", _TYPES[actual.type], _TYPES[expected.type])
        return
    yield from _attributes(path, actual, expected)
    if stat.S_ISDIR(actual.type):
        yield from _directories(path, actual, expected, one, other)
        return
    if (found := one.leader(actual, path)) != (wanted := other.leader(expected, path)):
        yield Difference(path, "links", os.fsdecode(found), os.fsdecode(wanted))
    if stat.S_ISLNK(actual.type):
        if (found := actual.target()) != (wanted := expected.target()):
            yield Difference(path, "target", os.fsdecode(found), os.fsdecode(wanted))
    elif stat.S_ISREG(actual.type):
        if actual.status.st_size != expected.status.st_size:
            yield Difference(path, "size", str(actual.status.st_size), str(expected.status.st_size))
        elif not os.path.samestat(actual.status, expected.status) and not _same_content(
            actual, expected
        ):
            yield Difference(path, "content")


def _attributes(path: bytes, actual: _Entry, expected: _Entry) -> Iterator[Difference]:
    found, wanted = actual.attribute, expected.attribute
    if found.mode != wanted.mode:
        yield Difference(path, "mode", f"{found.mode:o}", f"{wanted.mode:o}")
    if (found.uid, found.gid) != (wanted.uid, wanted.gid):
        yield Difference(path, "owner", f"{found.uid}:{found.gid}", f"{wanted.uid}:{wanted.gid}")
    if (found.major, found.minor) != (wanted.major, wanted.minor):
        yield Difference(
            path, "device", f"{found.major}:{found.minor}", f"{wanted.major}:{wanted.minor}"
        )
    unit = 10**9 if stat.S_ISDIR(actual.type) else 1
    if actual.status.st_mtime_ns // unit != expected.status.st_mtime_ns // unit:
        yield Difference(
            path, "mtime", str(actual.status.st_mtime_ns), str(expected.status.st_mtime_ns)
        )


def _directories(
    path: bytes, actual: _Entry, expected: _Entry, one: _Side, other: _Side
) -> Iterator[Difference]:
    actual_directory = actual.open(os.O_DIRECTORY)
    expected_directory = expected.open(os.O_DIRECTORY)
    try:
        found, wanted = (
            {name for name, _ in listed(descriptor)}
            for descriptor in (actual_directory, expected_directory)
        )
        for name in sorted(found | wanted):
            below = path + b"/" + name if path else name
            if name not in wanted:
                yield Difference(below, "extra")
            elif name not in found:
                yield Difference(below, "missing")
            else:
                yield from _compare(
                    below,
                    one.entry(name, actual_directory),
                    other.entry(name, expected_directory),
                    one,
                    other,
                )
    finally:
        os.close(actual_directory)
        os.close(expected_directory)


def _same_content(actual: _Entry, expected: _Entry) -> bool:
    actual_file, expected_file = actual.open(), expected.open()
    try:
        position, size = 0, actual.status.st_size
        while position < size:
            chunk = os.pread(actual_file, _CHUNK, position)
            if not chunk or chunk != os.pread(expected_file, _CHUNK, position):
                return False
            position += len(chunk)
        return True
    finally:
        os.close(actual_file)
        os.close(expected_file)
