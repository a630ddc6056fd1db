"""Engine compatibility: finds bases whose bytes an engine reassembles differently from their tars.
A delta from such a base would fail.

A copy command names a position in the concatenation of the base's layer tars. The engine does not
keep these tars: it rebuilds them from the files that it unpacked. Measured on balena-engine
20.10.44, that fails for

* sparse entries: the engine counts the file's logical size, which shifts everything behind the
  entry;
* regular files whose path leads through a symbolic link of the same layer. The engine reads their
  bytes from the link's destination on the device, or from the file that overwrote them.

The full pull of such an image works. A delta from it would fail on the device at the end of the
download, and the device would retry for ever. So none is built.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from obdelta.delta.kernel.binding import LayerFile, MappedFile
from obdelta.delta.tar_index import SPARSE, Entries, walk
from obdelta.errors import BaseUnusable

_LINK = ord("2")
_REGULAR = frozenset(b"0\0" + b"7")


def check_addressable(base: Sequence[LayerFile]) -> None:
    """Raises BaseUnusable for a base whose bytes an engine orders differently from its tars."""
    entries = []
    for layer in base:
        file = MappedFile(layer.path)
        try:
            entries.append(Entries(walk(file)))
        finally:
            file.close()
    check_entries(base, entries)


def check_entries(base: Sequence[LayerFile], entries: Sequence[Entries]) -> None:
    """Does the same as :func:`check_addressable` if each layer's entries are known."""
    for number, (layer, present) in enumerate(zip(base, entries, strict=True), 1):
        why = _why_not(present)
        if why is not None:
            raise BaseUnusable(f"{why} (layer {number}, {layer.diff_id})")


def _why_not(entries: Entries) -> str | None:
    links: set[bytes] = set()
    folders: set[bytes] = set()  # those with non-empty files: far fewer than files
    for name, (_, _, size, _, _, _, _, kind) in zip(entries.names, entries.fields, strict=True):
        if kind & SPARSE:
            return "it has a sparse entry"
        if size and kind & 0xFF in _REGULAR:
            folders.add(name.rpartition(b"/")[0])
        elif kind & 0xFF == _LINK:
            links.add(_normal(name))
    if _any_below(folders, links):
        return "it has a file whose path leads through a symbolic link of the same layer"
    return None


def _normal(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _any_below(folders: set[bytes], links: set[bytes]) -> bool:
    """Returns whether a directory is one of the links or below one; near-linear for paths of any
    depth.
    """
    tops: list[bytes] = []  # none of them is below another
    for link in sorted(link + b"/" for link in links):
        if not tops or not link.startswith(tops[-1]):
            tops.append(link)
    for folder in folders if tops else ():
        path = _normal(folder) + b"/"
        # A path's prefix, if there is one, is the last top that does not sort behind the path:
        # those between would begin with that prefix.
        place = bisect.bisect_right(tops, path)
        if place and path.startswith(tops[place - 1]):
            return True
    return False
