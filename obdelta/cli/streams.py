"""``obdelta diff`` and ``obdelta patch``: the librsync stream of one layer, without a server.

The stream is raw (``72 73 02 36 …``), as ``rdiff`` writes and reads it; inside delta images the same stream is wrapped.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, cast

from obdelta.delta.build import Effort, LayerFile, build_layer
from obdelta.delta.verify import patch
from obdelta.oci.digest import DiffID

STANDARD = "-"


def diff(base: Path, target: Path, output: str, effort: str) -> None:
    """Writes the stream that makes ``target`` of ``base``; proven before it is written."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work, written(output) as out:
        blob = Path(work, "delta.tar.gz")
        build_layer(
            [_layer(base)], _layer(target), blob, effort=Effort(effort), threads=threads, index_dir=None, progress=None
        )
        with tarfile.open(blob) as tar:
            stream = tar.extractfile("delta")
            if stream is not None:
                copyfileobj(stream, out)


def patch_file(base: Path, delta: str, output: str) -> None:
    """Applies a stream; raises StreamInvalid for one that cannot be read to its end."""
    with read(delta) as stream, written(output) as out:
        patch(base, stream, out)


def _layer(path: Path) -> LayerFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LayerFile(DiffID(digest), path, path.stat().st_size)


@contextmanager
def read(name: str) -> Iterator[BinaryIO]:
    """The named file, or stdin for ``-``."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


@contextmanager
def written(name: str) -> Iterator[BinaryIO]:
    """A file that gets its name only when the block has ended well; stdout for ``-``."""
    if name == STANDARD:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield cast(BinaryIO, out)
            out.flush()
            os.fsync(out.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
