"""Bases of which a device's engine does not see the bytes that their layer tars have.

A copy command names a position in the concatenation of the base's layer tars. The engine does not
keep these tars: it puts them together again from the files that it unpacked. Measured on
balena-engine 20.10.44, that goes wrong for

* sparse entries: the engine counts the file's logical size, so that everything behind the entry is
  shifted;
* regular files whose path leads through a symbolic link of the same layer: their bytes are read
  from where the link leads on the device, or from what overwrote them.

The full pull of such an image works. A delta from it would fail on the device at the end of the
download, and be tried again for ever, so none is made.
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
    """Raises BaseUnusable for a base that an engine addresses otherwise than its tars lie."""
    entries = []
    for layer in base:
        file = MappedFile(layer.path)
        try:
            entries.append(Entries(walk(file)))
        finally:
            file.close()
    check_entries(base, entries)


def check_entries(base: Sequence[LayerFile], entries: Sequence[Entries]) -> None:
    """:func:`check_addressable` where each layer's entries are known."""
    for number, (layer, present) in enumerate(zip(base, entries, strict=True), 1):
        why = _why_not(present)
        if why is not None:
            raise BaseUnusable(f"{why} (layer {number}, {layer.diff_id})")


def _why_not(entries: Entries) -> str | None:
    links: set[bytes] = set()
    folders: set[bytes] = set()  # that have files with content in them: far fewer than files
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
    """Whether a folder is one of the links or below one; near-linear, however deep the paths are."""
    tops: list[bytes] = []  # no one below another
    for link in sorted(link + b"/" for link in links):
        if not tops or not link.startswith(tops[-1]):
            tops.append(link)
    for folder in folders if tops else ():
        path = _normal(folder) + b"/"
        # What a path begins with is the last one that is not behind it: those between would begin
        # with that one.
        place = bisect.bisect_right(tops, path)
        if place and path.startswith(tops[place - 1]):
            return True
    return False
