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

from obdelta.cli.options import OK, Commands
from obdelta.oci.digest import DiffID
from obdelta.settings import table

STANDARD = "-"


def add_to(commands: Commands) -> None:
    """Both commands."""
    parser = commands.add(
        "diff",
        lambda parsed: diff(parsed.base, parsed.target, parsed.output, parsed.effort),
        "make the librsync delta stream that leads from one layer tar to another",
        "The stream is proven before it is written; `rdiff patch` applies it too.",
        ["obdelta diff old.tar new.tar -o delta", "obdelta diff old.tar new.tar -o - --effort small | zstd >delta.zst"],
    )
    parser.add_argument("base", metavar="BASE_TAR", type=Path, help="the layer that the device has (uncompressed)")
    parser.add_argument("target", metavar="TARGET_TAR", type=Path, help="the layer that it shall have (uncompressed)")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the stream to write; - for stdout")
    row = next(row for row in table() if row.key == "effort")
    meaning = row.meaning.replace("`", "")
    parser.add_argument("--effort", choices=("fast", "balanced", "small"), default=row.default, help=meaning)

    parser = commands.add(
        "patch",
        lambda parsed: patch_file(parsed.base, parsed.delta, parsed.output),
        "apply a librsync delta stream to a file",
        "Streams of `obdelta diff` and of `rdiff delta`. Nothing is left under the output's name when it fails.",
        ["obdelta patch old.tar delta -o new.tar"],
    )
    parser.add_argument("base", metavar="BASE_TAR", type=Path, help="the file that the stream copies from")
    parser.add_argument("delta", metavar="DELTA", help="the stream, of `obdelta diff` or `rdiff delta`; - for stdin")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write; - for stdout")


def diff(base: Path, target: Path, output: str, effort: str) -> int:
    """Writes the stream that makes ``target`` of ``base``; proven before it is written."""
    from obdelta.delta.build import Effort, LayerFile, build_layer

    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work, written(output) as out:
        blob = Path(work, "delta.tar.gz")
        build_layer(
            [LayerFile(*_layer(base))],
            LayerFile(*_layer(target)),
            blob,
            effort=Effort(effort),
            threads=threads,
            index_dir=None,
            progress=None,
        )
        with tarfile.open(blob) as tar:
            stream = tar.extractfile("delta")
            if stream is not None:
                copyfileobj(stream, out)
    return OK


def patch_file(base: Path, delta: str, output: str) -> int:
    """Applies a stream; raises StreamInvalid for one that cannot be read to its end."""
    from obdelta.delta.verify import patch

    with read(delta) as stream, written(output) as out:
        patch(base, stream, out)
    return OK


def _layer(path: Path) -> tuple[DiffID, Path, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DiffID(digest), path, path.stat().st_size


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
