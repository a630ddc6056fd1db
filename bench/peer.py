"""Deltas of a pair that other programs make: open-balena-delta (balena-engine's builder, replaced
by ``rdiff``) and two bounds.

balena-engine's own builder is librsync with 512-byte blocks and full BLAKE2b sums over the
concatenated source, and gzip at its default level. The bytes of ``rdiff -b 512 -S 32`` and ``gzip
-6`` are within 3 % of its own. The layers are those for which the engine makes a delta: all from
the first that differs on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

from bench.corpus import CACHE, Pair, tar_path
from bench.images import Layer
from obdelta.oci.digest import DiffID, common_prefix

_BSDIFF_MEMORY = 6 << 30
"""Bytes; bsdiff needs 17 times the base."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The figures of open-balena-delta for a pair: compressed bytes, and the wall seconds of each
    step, one after the other.

    ``cpu``: processor seconds of these steps, which other work on the machine changes less.
    ``patch``: seconds in which ``rdiff patch`` applies the deltas; no part of making them.
    """

    size: int
    signature: float
    delta: float
    gzip: float
    cpu: float
    patch: float

    @property
    def seconds(self) -> float:
        """The seconds of all steps of making the deltas."""
        return self.signature + self.delta + self.gzip


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes that other formats would need, which devices cannot read; None if it was not run (and
    ``why``).
    """

    zstd: int | None
    bsdiff: int | None
    why: str = ""


def differing(pair: Pair) -> Sequence[Layer]:
    """Returns the target's layers from the first that differs on."""
    return pair.target.layers[common_prefix(pair.base.diff_ids, pair.target.diff_ids) :]


@contextmanager
def concatenated(layers: Sequence[Layer], scratch: Path) -> Iterator[Path]:
    """Writes the base as one file: all its layers' tars, bottom to top."""
    base = scratch / "base.concatenated"
    try:
        with base.open("wb") as out:
            for layer in layers:
                with tar_path(layer).open("rb") as tar:
                    shutil.copyfileobj(tar, out, 1 << 22)
        yield base
    finally:
        base.unlink(missing_ok=True)


def sign(base: Path, signature: Path) -> None:
    """Writes the signature of a base."""
    _run("rdiff", "-f", "-b", "512", "-S", "32", "signature", base, signature)


def make_delta(signature: Path, target: Path, delta: Path) -> None:
    """Writes the stream that makes a target."""
    _run("rdiff", "-f", "delta", signature, target, delta)


def wrap(delta: Path, tar: Path) -> None:
    """Writes the tar of a delta layer."""
    entry = tarfile.TarInfo("delta")
    entry.size = delta.stat().st_size
    with tarfile.open(tar, "w") as wrapped, delta.open("rb") as content:
        wrapped.addfile(entry, content)


def compress(tar: Path, blob: Path) -> None:
    """Writes the blob of a delta layer."""
    with tar.open("rb") as source, blob.open("wb") as out:
        subprocess.run(["gzip", "-6", "-n"], stdin=source, stdout=out, check=True)


def measure(base: Path, targets: Sequence[Path], scratch: Path) -> Peer:
    """Runs rdiff and gzip now."""
    signature, delta, tar, blob = (
        scratch / f"peer.{what}" for what in ("signature", "delta", "tar", "gz")
    )
    size, deltas, gzips, patches, cpu = 0, 0.0, 0.0, 0.0, -_children_cpu()
    try:
        started = time.monotonic()
        sign(base, signature)
        signed = time.monotonic() - started
        for target in targets:
            started = time.monotonic()
            make_delta(signature, target, delta)
            deltas += time.monotonic() - started
            wrap(delta, tar)
            started = time.monotonic()
            compress(tar, blob)
            gzips += time.monotonic() - started
            size += blob.stat().st_size
            cpu += _children_cpu()
            patches += _patch(base, delta)[1]
            cpu -= _children_cpu()
    finally:
        for path in (signature, delta, tar, blob):
            path.unlink(missing_ok=True)
    return Peer(size, signed, deltas, gzips, cpu + _children_cpu(), patches)


def _children_cpu() -> float:
    """Returns the processor seconds of the children that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cached(pair: Pair, base: Path, scratch: Path) -> Peer:
    """Returns the figures of open-balena-delta, measured once and then kept."""
    record = _record(pair, "rdiff")
    if record.exists():
        return Peer(**json.loads(record.read_bytes()))
    found = measure(base, [tar_path(layer) for layer in differing(pair)], scratch)
    record.write_text(json.dumps(asdict(found)))
    return found


def bounds(pair: Pair, base: Path, scratch: Path, *, seconds: float) -> Bounds:
    """Returns the bytes of zstd and bsdiff for the layers that the base does not have: from the
    cache, or run with a limit of seconds.
    """
    deadline = time.monotonic() + seconds
    sizes: dict[str, int | None] = {}
    why = ""
    targets = _bound_targets(pair)
    memory = 17 * base.stat().st_size
    programs: tuple[tuple[str, list[str | Path], list[str]], ...] = (
        ("zstd", ["zstd", "-q", "-f", "-19", "--long=31", f"--patch-from={base}"], ["-o"]),
        ("bsdiff", ["bsdiff", base], []),
    )
    for name, command, out in programs:
        sizes[name] = None
        record = _record(pair, name)
        if record.exists():
            sizes[name] = int(json.loads(record.read_bytes()))
        elif name == "bsdiff" and memory > _BSDIFF_MEMORY:
            why = f"bsdiff needs {memory / 10**9:.1f} GB of memory"
        elif time.monotonic() >= deadline:
            why = "for lack of time"
        else:
            try:
                sizes[name] = _bound(command, out, targets, scratch / name, deadline)
                record.write_text(json.dumps(sizes[name]))
            except subprocess.TimeoutExpired:
                why = "for lack of time"
    return Bounds(sizes["zstd"], sizes["bsdiff"], why)


def _bound_targets(pair: Pair) -> list[Path]:
    return [tar_path(layer) for layer in differing(pair) if layer.diff_id not in pair.base.diff_ids]


def _bound(
    head: Sequence[str | Path],
    tail: Sequence[str],
    targets: Sequence[Path],
    out: Path,
    deadline: float,
) -> int:
    """Returns the sum of the output sizes of ``head target tail out`` for the targets."""
    size = 0
    try:
        for target in targets:
            _run(*head, target, *tail, out, seconds=max(deadline - time.monotonic(), 0.1))
            size += out.stat().st_size
    finally:
        out.unlink(missing_ok=True)
    return size


def prove(base: Path, blob: Path, target: DiffID, scratch: Path) -> float:
    """Applies a delta layer with ``rdiff patch``, which is not our program; raises ValueError on
    other bytes. Returns the seconds of the patching, without the inflating of the layer.
    """
    stream = scratch / "stream"
    try:
        with blob.open("rb") as file, stream.open("wb") as out:
            is_zstd = file.read(4) == zstandard.FRAME_HEADER
            file.seek(0)
            # tarfile's own gzip reader stops behind the first member, and a layer may have many.
            tar = (
                zstandard.ZstdDecompressor().stream_reader(file)
                if is_zstd
                else gzip.GzipFile(fileobj=file)
            )
            with tarfile.open(fileobj=tar, mode="r|") as layer:
                delta = layer.extractfile(layer.next() or "delta")
                if delta is None:
                    raise ValueError(f"{blob.name} holds no delta")
                shutil.copyfileobj(delta, out, 1 << 20)
        patched, seconds = _patch(base, stream)
        if patched != target:
            raise ValueError(f"rdiff patch makes {patched}, not {target}")
    finally:
        stream.unlink(missing_ok=True)
    return seconds


def _patch(base: Path, stream: Path) -> tuple[DiffID, float]:
    started = time.monotonic()
    sha256 = hashlib.sha256()
    with subprocess.Popen(["rdiff", "patch", base, stream, "-"], stdout=subprocess.PIPE) as patch:
        assert patch.stdout is not None
        while chunk := patch.stdout.read(1 << 20):
            sha256.update(chunk)
    if patch.returncode != 0:
        raise ValueError(f"rdiff patch ends with {patch.returncode}")
    return DiffID(sha256.hexdigest()), time.monotonic() - started


def _record(pair: Pair, what: str) -> Path:
    folder = CACHE / what
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(
        " ".join(map(str, (*pair.base.diff_ids, "→", *pair.target.diff_ids))).encode()
    ).hexdigest()
    return folder / f"{pair.recipe.name}-{key[:16]}.json"


def _run(*command: str | Path, seconds: float | None = None) -> None:
    """Runs a command without output, unless it fails. Raises TimeoutExpired."""
    ran = subprocess.run(command, capture_output=True, check=False, timeout=seconds)
    if ran.returncode != 0:
        raise RuntimeError(
            f"{command[0]} ended with {ran.returncode}:"
            f" {ran.stderr[-300:].decode('utf-8', 'replace')}"
        )
