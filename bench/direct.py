"""obdelta's delta builder alone, on a pair's layers, in a separate process without server and
registry.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import peer
from bench.corpus import CACHE, Pair, tar_path
from bench.images import Layer


@dataclass(frozen=True, slots=True)
class Figures:
    """Measurements of a build: bytes of the delta layers, seconds (wall, processor), commands, and
    bytes of memory.

    ``patch``: seconds in which ``rdiff patch`` applies the layers. ``peak``: the peak resident set
    of the process (VmHWM), with pages of mapped files. ``anonymous``: the highest sampled resident
    set without them (every 20 ms).
    """

    size: int
    seconds: float
    cpu: float
    target_bytes: int
    copies: int
    small_copies: int
    literal_bytes: int
    patch: float
    stages: dict[str, float]
    peak: int
    anonymous: int

    @property
    def copies_per_mb(self) -> float:
        """Copies for each 2^20 bytes of target."""
        return self.copies / max(self.target_bytes / 2**20, 1e-9)


def build(
    pair: Pair, base: Path, scratch: Path, *, effort: str, threads: int, index_dir: Path | None
) -> Figures:
    """Builds every layer from the first that differs on, and proves each with rdiff.

    ``index_dir`` holds the base's indexes: an empty one gives a cold run, a used one a run with
    the index cached.
    """
    targets = peer.differing(pair)
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        job = {
            "base": [_layer_file(layer) for layer in pair.base.layers],
            "targets": [_layer_file(layer) for layer in targets],
            "out": out,
            "effort": effort,
            "threads": threads,
            "index_dir": str(index_dir) if index_dir else None,
        }
        answer, anonymous = _run(json.dumps(job))
        patch = sum(
            peer.prove(base, Path(out) / str(number), target.diff_id, scratch)
            for number, target in enumerate(targets)
        )
    stages: dict[str, float] = {}
    for layer in answer["layers"]:
        for stage, seconds in layer["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return Figures(
        size=sum(layer["size"] for layer in answer["layers"]),
        seconds=answer["seconds"],
        cpu=answer["cpu"],
        target_bytes=sum(layer.tar_size for layer in targets),
        copies=sum(layer["copies"] for layer in answer["layers"]),
        small_copies=sum(layer["small_copies"] for layer in answer["layers"]),
        literal_bytes=sum(layer["literal_bytes"] for layer in answer["layers"]),
        patch=patch,
        stages=stages,
        peak=answer["peak"],
        anonymous=anonymous,
    )


def _layer_file(layer: Layer) -> tuple[str, str, int]:
    return layer.diff_id.hex, str(tar_path(layer)), layer.tar_size


def _run(job: str) -> tuple[dict, int]:  # type: ignore[type-arg]
    with tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.child"],
            stdin=subprocess.PIPE,
            stdout=answer,
            cwd=CACHE.parent,
            text=True,
        )
        assert process.stdin is not None
        with process, process.stdin as pipe:
            pipe.write(job)
            pipe.close()
            anonymous = watch(process)
        if process.returncode != 0:
            raise RuntimeError(f"the build failed with exit status {process.returncode}")
        answer.seek(0)
        return json.load(answer), anonymous


def watch(process: subprocess.Popen[str]) -> int:
    """Waits for the process; returns its highest anonymous resident set, in bytes."""
    highest = 0
    while True:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            highest = max(highest, memory(process.pid, "RssAnon"))
        else:
            return highest


def memory(pid: int, field: str) -> int:
    """Returns a field of ``/proc/PID/status`` in bytes; 0 if the process has ended."""
    try:
        lines: Sequence[str] = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
