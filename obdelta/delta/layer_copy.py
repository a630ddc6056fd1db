"""Delta layers that copy a whole base layer, for the leading layers that base and target share.

An engine that has the base as an image skips these layers. An engine that has the base in another
store (``--delta-data-root``, host-OS updates) applies them, and fails on an empty layer in their
place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import deflate

from obdelta.delta.build import copy_tar
from obdelta.delta.image import MadeLayer
from obdelta.oci import DiffID, Digest

_LEVEL = 12
"""libdeflate's level; the tar is below 2 KB, so that the time does not matter."""


class LayerCopy(NamedTuple):
    """A delta layer with its gzip'd bytes."""

    content: bytes
    layer: MadeLayer


def layer_copies(base: Iterable[tuple[DiffID, int]]) -> list[LayerCopy]:
    """Returns a copy of each of the first layers of a base, given as diff_ids and sizes of their
    tars, bottom to top.

    A layer that occurs twice is copied from its first position: the same layer has the same bytes.
    Nothing is read. A diff_id and its size were taken from the same tar when the layer was
    inflated, so the copied range hashes to the diff_id.
    """
    places: dict[DiffID, int] = {}
    start, copies = 0, []
    for diff_id, size in base:
        copies.append(_copied(places.setdefault(diff_id, start), size, diff_id))
        start += size
    return copies


def _copied(start: int, size: int, target: DiffID) -> LayerCopy:
    tar = copy_tar(start, size)
    content = bytes(deflate.gzip_compress(tar, _LEVEL))
    return LayerCopy(content, MadeLayer(Digest.of(content), len(content), DiffID.of(tar), target))
