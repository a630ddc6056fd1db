"""Unpacks layers into a root filesystem without root: the tree that Docker's overlay2 driver would
show.

The tree has the attributes that rsync's ``--fake-super`` reads (:mod:`obdelta.rootfs.fake_super`).
The engine's rules were read from Docker 20.10 (``pkg/archive``); the tests compare the result with
a real engine:

- A directory has the attributes of the topmost layer that has the directory at all. A layer that
  has something in a directory, but no entry for it, resets it to 0755 root. In an engine, the mtime
  of such a directory is the time of the pull; here it is the newest mtime of the layer. Every layer
  resets the root directory; an entry ``./`` changes nothing.
- Symbolic links of the *same* layer are followed on the way to an entry, as in a chroot; those of
  lower layers are replaced.
- mtimes before 1970 or after 2262 become 0, except those of symbolic links. The last hard link's
  attributes count.
- Sizes, owners, modes and device numbers are kept. Extended attributes are not: open-balena-delta's
  rsync does not send them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from obdelta.oci import DiffID
from obdelta.rootfs import fake_super
from obdelta.rootfs.apply_layer import IMPLIED, Layer
from obdelta.rootfs.bounds import DEFAULT_LIMITS, Bounds, Limits
from obdelta.rootfs.tree import Names, Tree


class Unpacked(NamedTuple):
    """The number of ``entries`` in the layers, and the bytes of their files."""

    entries: int
    size: int


def unpack(
    layers: Sequence[tuple[DiffID, Path]],
    out: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
) -> Unpacked:
    """Makes the directory ``out`` (it must not exist; closed to others) and in it the tree
    ``root``.

    ``layers`` are uncompressed tars, bottom to top. ``progress`` gets the bytes of file content
    written so far. Raises LayerInvalid for a layer that an engine would refuse or that is over a
    limit, SettingsError if the file system does not take the attributes, OSError. After an error
    the caller removes what exists of the tree.
    """
    out.mkdir(mode=0o700)
    fake_super.require_attributes(out)
    root = out / "root"
    root.mkdir(mode=0o700)
    bounds = Bounds(limits, progress)
    mtimes: dict[bytes, int] = {}
    with Tree(root) as tree:
        IMPLIED.write(tree.open(()))
        for diff_id, path in layers:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                Layer(diff_id, descriptor, tree, mtimes, bounds).apply()
            finally:
                os.close(descriptor)
        _date_directories(tree, mtimes)
    return Unpacked(bounds.entries, bounds.size)


def _date_directories(tree: Tree, mtimes: dict[bytes, int]) -> None:
    """Sets directory mtimes last: adding or removing an entry changes its directory's mtime."""
    for path in sorted(mtimes):
        try:
            descriptor = tree.open(_names(path))
        except (FileNotFoundError, NotADirectoryError):  # a higher layer has removed or replaced it
            continue
        os.utime(descriptor, ns=(mtimes[path], mtimes[path]))


def _names(key: bytes) -> Names:
    return tuple(key.split(b"/")) if key else ()
