"""``obdelta diff`` and ``obdelta patch``: the librsync stream of one layer, without a server.

The stream is raw (``72 73 02 36 …``), in the format of ``rdiff``. Delta images hold the same stream
in a tar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, cast

from obdelta.cli.options import OK, Commands, WrongUsage, add_json
from obdelta.cli.terminal import Line
from obdelta.concurrency.cores import available_cores
from obdelta.oci.digest import DiffID
from obdelta.settings import table
from obdelta.settings.parsers import link

STANDARD = "-"


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "diff",
        diff,
        "make the librsync delta stream from one layer tar to another",
        "The stream is proven before it is written; `rdiff patch` applies it too.",
        [
            "obdelta diff old.tar new.tar -o delta",
            "obdelta diff old.tar new.tar -o - --effort small | zstd >delta.zst",
        ],
    )
    parser.add_argument(
        "base", metavar="BASE_TAR", type=Path, help="the layer that the device has (uncompressed)"
    )
    parser.add_argument(
        "target",
        metavar="TARGET_TAR",
        type=Path,
        help="the layer to update to (uncompressed)",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="the stream to write; - for stdout"
    )
    rows = {row.key: row for row in table()}
    parser.add_argument(
        "--effort",
        choices=("fast", "balanced", "small"),
        default=rows["effort"].default,
        help=rows["effort"].help,
    )
    parser.add_argument(
        "--device-link",
        metavar="SPEED",
        type=link,
        default=rows["device-link"].default,
        help=rows["device-link"].help,
    )
    add_json(parser)

    parser = commands.add(
        "patch",
        patch_file,
        "apply a librsync delta stream to a file",
        "Reads streams of `obdelta diff` and of `rdiff delta`. After a failure there is"
        " no output file.",
        ["obdelta patch old.tar delta -o new.tar"],
    )
    parser.add_argument(
        "base", metavar="BASE_TAR", type=Path, help="the file that the stream copies from"
    )
    parser.add_argument(
        "delta", metavar="DELTA", help="the stream, of `obdelta diff` or `rdiff delta`; - for stdin"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="the file to write; - for stdout"
    )
    add_json(parser)


def diff(parsed: argparse.Namespace) -> int:
    """Writes the stream from one tar to another. The stream is proven before it is written."""
    from obdelta.delta.build import Effort, LayerFile, Progress, build_layer
    from obdelta.delta.effort import DEFAULT_LINK, command_prices

    _check_output(parsed)
    threads = available_cores()
    # No devices are known here from which a link could be learned.
    speed = DEFAULT_LINK if parsed.device_link is None else parsed.device_link
    with (
        tempfile.TemporaryDirectory(prefix="obdelta-") as work,
        open_output(parsed.output) as out,
        Line(sys.stderr) as line,
    ):

        def progress(step: Progress) -> None:
            line.show(step.stage, step.done / step.of if step.of else None)

        blob = Path(work, "delta.tar.gz")
        line.show("reading")
        layer = build_layer(
            [LayerFile(*_layer(parsed.base))],
            LayerFile(*_layer(parsed.target)),
            blob,
            prices=command_prices(speed),
            effort=Effort(parsed.effort),
            threads=threads,
            progress=progress,
        )
        with tarfile.open(blob) as tar:
            stream = tar.extractfile("delta")
            if stream is None:
                raise AssertionError("we have just written it")
            copyfileobj(stream, out)
    if parsed.json:
        print(
            json.dumps(
                {
                    "file": parsed.output,
                    "target": str(layer.target),
                    "tar_bytes": parsed.target.stat().st_size,
                    "bytes": Path(parsed.output).stat().st_size,
                    "compressed_bytes": layer.size,
                    "literal_bytes": layer.literal_bytes,
                    "copied_bytes": layer.copied_bytes,
                    "copies": layer.copies,
                }
            )
        )
    return OK


def patch_file(parsed: argparse.Namespace) -> int:
    """Applies a stream. Raises StreamInvalid for one that cannot be read to its end."""
    from obdelta.delta.apply import patch

    _check_output(parsed)
    with open_input(parsed.delta) as stream, open_output(parsed.output) as out:
        made = patch(parsed.base, stream, out)
    if parsed.json:
        size = Path(parsed.output).stat().st_size
        print(json.dumps({"file": parsed.output, "bytes": size, "target": str(made)}))
    return OK


def _check_output(parsed: argparse.Namespace) -> None:
    if parsed.json and parsed.output == STANDARD:
        raise WrongUsage("--json cannot be used with output to stdout: give a file")


def _layer(path: Path) -> tuple[DiffID, Path, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DiffID(digest), path, path.stat().st_size


@contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """Opens the named file, or stdin for ``-``."""
    if name == STANDARD:
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


@contextmanager
def open_output(name: str) -> Iterator[BinaryIO]:
    """Opens a file that gets its name only when the block succeeds, or stdout for ``-``.

    A symbolic link stays, and points to the new file. A pipe or a device is written in place.
    """
    if name == STANDARD:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()
    if path.exists() and not path.is_file():
        with path.open("wb") as out:  # raises for a directory
            yield cast(BinaryIO, out)
        return
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
