"""Checks delta layers as an engine applies them: inflated, patched, and compared by diff_id."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from obdelta.delta.apply import patch
from obdelta.delta.build import LayerFile
from obdelta.delta.image import EMPTY_LAYER_DIFF_ID
from obdelta.errors import DigestMismatch, LayerInvalid
from obdelta.oci.digest import DiffID

ZSTD_WINDOW = 8 << 20
"""The largest window that a delta layer may declare: a device allocates it."""
_CHUNK = 1 << 20


class _Hashed:
    """A reader that hashes the bytes read, for the stream mode of :mod:`tarfile`."""

    def __init__(self, inner: BinaryIO) -> None:
        self._inner, self._sha256 = inner, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._inner.read(size)
        self._sha256.update(chunk)
        return chunk

    def finish(self) -> DiffID:
        """Reads the rest, and returns the hash of everything."""
        while self.read(_CHUNK):
            pass
        return DiffID(self._sha256.hexdigest())


def _open_zstd(blob: Path, mode: str) -> BinaryIO:
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    return cast(BinaryIO, zstandard.open(blob, mode, dctx=decompressor))


@contextmanager
def _opened(blob: Path, diff_id: DiffID) -> Iterator[_Hashed]:
    """Opens a layer blob inflated, as an engine does (gzip, zstd, bzip2 or plain, by its first
    bytes). Verifies its diff_id.
    """
    with blob.open("rb") as file:
        head = file.read(4)
    opener: Callable[..., Any] = open
    if head[:2] == b"\x1f\x8b":
        opener = gzip.open
    elif head[:3] == b"BZh":
        opener = bz2.open
    elif head == b"\x28\xb5\x2f\xfd":
        opener = _open_zstd
    try:
        with opener(blob, "rb") as inner:
            source = _Hashed(cast(BinaryIO, inner))
            yield source
            actual = source.finish()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise LayerInvalid(diff_id, f"cannot be inflated: {error}") from error
    if actual != diff_id:
        raise DigestMismatch(diff_id, actual, "inflated delta layer")


def check_shared(base: Sequence[LayerFile], blob: Path, diff_id: DiffID, target: DiffID) -> None:
    """Checks the delta layer of a layer that both images share: a copy of it, or the empty tar of
    balena-engine.
    """
    if diff_id != EMPTY_LAYER_DIFF_ID:
        check_patched(base, blob, diff_id, target)
        return
    with _opened(blob, diff_id):
        pass


def check_patched(base: Sequence[LayerFile], blob: Path, diff_id: DiffID, target: DiffID) -> None:
    """Checks a delta layer whose first entry is ``delta``: a stream from the base to the target's
    layer.
    """
    with (
        _opened(blob, diff_id) as source,
        tarfile.open(fileobj=cast(BinaryIO, source), mode="r|") as tar,
    ):
        member = tar.next()
        stream = tar.extractfile(member) if member is not None and member.name == "delta" else None
        if stream is None:
            raise LayerInvalid(diff_id, "its first entry is not a file named delta")
        with stream:
            made = patch(base, cast(BinaryIO, stream), None)
    if made != target:
        raise DigestMismatch(target, made, "patched layer")
