"""Layer tars, and builds from them, for tests of the delta builder."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from obdelta.delta.build import DeltaLayer, Effort, LayerFile, build_layer
from obdelta.delta.effort import DEFAULT_PRICES
from obdelta.oci import DiffID, Form


class File(NamedTuple):
    """A regular file of a tar."""

    name: str
    content: bytes
    mtime: int = 0


def tar_of(files: Iterable[File], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Returns a tar of regular files, in that order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content, mtime in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def layer_file(content: bytes, folder: Path) -> LayerFile:
    """Writes the bytes as a layer on disk."""
    diff_id = DiffID.of(content)
    path = folder / f"{diff_id.hex}.tar"
    path.write_bytes(content)
    return LayerFile(diff_id, path, len(content))


def tar_in(blob: bytes) -> bytes:
    """Returns the tar in a delta layer's blob, read by other code than ours."""
    if blob[:2] == b"\x1f\x8b":
        return gzip.decompress(blob)
    return subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout


def stream_of(blob: bytes) -> bytes:
    """Returns the stream in a delta layer's blob."""
    with tarfile.open(fileobj=io.BytesIO(tar_in(blob))) as tar:
        (entry,) = tar.getmembers()
        assert (entry.name, entry.mode, entry.mtime, entry.isreg()) == ("delta", 0o600, 0, True)
        file = tar.extractfile(entry)
        assert file is not None
        return file.read()


class Made(NamedTuple):
    """A built delta: its blob, the stream inside, and the builder's report."""

    blob: bytes
    stream: bytes
    layer: DeltaLayer


def build(
    base: Sequence[bytes],
    target: bytes,
    *,
    form: Form = Form.GZIP,
    price: float | None = None,
    effort: Effort = Effort.BALANCED,
    threads: int = 1,
    index_dir: Path | None = None,
) -> Made:
    """Builds a delta from layers in memory; ``price`` is the price of a command."""
    with tempfile.TemporaryDirectory() as folder:
        layers = [layer_file(content, Path(folder)) for content in base]
        out = Path(folder) / "out"
        layer = build_layer(
            layers,
            layer_file(target, Path(folder)),
            out,
            form=form,
            prices=DEFAULT_PRICES if price is None else {form: price},
            effort=effort,
            threads=threads,
            index_dir=index_dir,
        )
        blob = out.read_bytes()
    return Made(blob, stream_of(blob), layer)


def by_rdiff(base: Sequence[bytes], stream: bytes, folder: Path) -> bytes:
    """Returns the target that Debian's ``rdiff patch`` makes of the stream."""
    paths = [folder / name for name in ("rdiff.base", "rdiff.delta", "rdiff.target")]
    paths[0].write_bytes(b"".join(base))
    paths[1].write_bytes(stream)
    subprocess.run(["rdiff", "-f", "patch", *paths], check=True)
    return paths[2].read_bytes()
