"""Opens and removes entries of a directory tree through descriptors, so that no link in it can lead
outside.

Paths are tuples of names; the root's is empty. Every directory is opened from its parent with
``O_NOFOLLOW``. Names are never ``.``, ``..`` or empty: the code that makes the paths ensures this.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

Names = tuple[bytes, ...]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RemovedKind(enum.Enum):
    """The kind of the entry that was removed."""

    NOTHING = "nothing"
    FILE = "file"
    DIRECTORY = "directory"


class Tree:
    """Opens directories below ``root``. The directories on the way to the last one stay open:
    entries come mostly in order.

    ``steps`` counts the work: directories opened and names removed. Callers add their own steps.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, _DIRECTORY)
        self.steps = 0
        self._names: list[bytes] = []
        self._descriptors: list[int] = [self._root]

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keep(0)
        os.close(self._root)

    def open(self, path: Names) -> int:
        """Returns the descriptor of a directory. It belongs to the tree and is valid until the next
        call. Raises OSError if there is no such directory.
        """
        names = self._names
        same = 0
        for name, wanted in zip(names, path, strict=False):
            if name != wanted:
                break
            same += 1
        self._keep(same)
        self.steps += len(path) - same
        for name in path[same:]:
            self._descriptors.append(os.open(name, _DIRECTORY, dir_fd=self._descriptors[-1]))
            names.append(name)
        return self._descriptors[-1]

    def remove(self, path: Names) -> RemovedKind:
        """Removes the entry at this path, with everything below it."""
        parent = self.open(path[:-1])
        try:
            os.unlink(path[-1], dir_fd=parent)
        except FileNotFoundError:
            return RemovedKind.NOTHING
        except IsADirectoryError:
            self.steps += _remove_directory(path[-1], parent)
            return RemovedKind.DIRECTORY
        return RemovedKind.FILE

    def _keep(self, depth: int) -> None:
        del self._names[depth:]
        while len(self._descriptors) > depth + 1:
            os.close(self._descriptors.pop())


def _remove_directory(name: bytes, parent: int) -> int:
    """Returns how many names were removed."""
    removed = 1
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        for child, is_directory in listed(descriptor):
            if is_directory:
                removed += _remove_directory(child, descriptor)
            else:
                os.unlink(child, dir_fd=descriptor)
                removed += 1
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=parent)
    return removed


def listed(descriptor: int) -> Iterator[tuple[bytes, bool]]:
    """Yields ``(name, is a directory)`` for the entries of an open directory, as it was at the
    call.
    """
    with os.scandir(descriptor) as entries:
        found = [
            (os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries
        ]
    return iter(found)
