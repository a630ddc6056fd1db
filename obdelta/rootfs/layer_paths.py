"""Paths of one layer's entries: cleaned as engines do, and resolved through its symbolic links."""

from __future__ import annotations

from collections.abc import Sequence

from obdelta.errors import LayerInvalid
from obdelta.oci import DiffID
from obdelta.rootfs.bounds import Bounds
from obdelta.rootfs.tree import Names, Tree

MAX_NAME = 255
"""Bytes of one name in a path; the limit of file systems."""
MAX_PATH = 4000
"""Bytes of a whole path; rsync's limit is 4096."""
MAX_DEPTH = 256
_HOPS = 40
_COMPONENTS = 16
"""Components of a path that are joined in the time of one step."""


class LayerPaths:
    """The paths of one layer. ``symlinks`` are its symbolic links so far: joined paths to
    targets.
    """

    def __init__(self, diff_id: DiffID, tree: Tree, bounds: Bounds) -> None:
        self._what, self._tree, self._bounds = diff_id, tree, bounds
        self.symlinks: dict[bytes, bytes] = {}

    def clean(self, name: bytes) -> tuple[Names, bytes]:
        """Returns the path that a name leads to, within the root, and the name as engines spell it.
        ``/x`` and ``x`` are two names to them.
        """
        names: list[bytes] = []
        above = 0
        for part in name.split(b"/"):
            if part == b"..":
                if names:
                    names.pop()
                else:
                    above += 1
            elif part not in (b"", b"."):
                names.append(part)
        self._check(names)
        start = b"/" if name.startswith(b"/") else b"../" * above
        return tuple(names), start + b"/".join(names)

    def _check(self, names: Sequence[bytes]) -> None:
        if len(names) > MAX_DEPTH or sum(map(len, names)) + len(names) > MAX_PATH:
            raise LayerInvalid(
                self._what, f"a path is deeper than {MAX_DEPTH} or longer than {MAX_PATH} bytes"
            )
        if names and max(map(len, names)) > MAX_NAME:
            raise LayerInvalid(self._what, f"a name is longer than {MAX_NAME} bytes")

    def resolve(self, directory: Names) -> Names:
        """Follows this layer's symbolic links, as the kernel does in a chroot."""
        if not self.symlinks:
            return directory
        found: list[bytes] = []
        waiting, hops = list(reversed(directory)), 0
        while waiting:
            part = waiting.pop()
            self._tree.steps += 1 + len(found) // _COMPONENTS
            if part == b"..":
                del found[-1:]
            elif part not in (b"", b"."):
                found.append(part)
                target = self.symlinks.get(b"/".join(found))
                if target is not None:
                    hops += 1
                    if hops > _HOPS:
                        raise LayerInvalid(self._what, "symbolic links form a loop")
                    found = [] if target.startswith(b"/") else found[:-1]
                    waiting += reversed(target.split(b"/"))
                    self._bounds.steps(self._tree.steps, self._what)
        self._check(found)
        return tuple(found)
