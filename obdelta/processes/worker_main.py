"""The worker process: inflates layers, builds v3 delta layers, unpacks trees for v2.

The pool starts it as ``python -m obdelta.processes.worker_main``. It uses neither Twisted nor
SQLite. Jobs arrive on stdin, one JSON object a line: ``{"task": NAME, …}``. JSON objects go out on
stdout: any number of ``{"progress": {…}}``, then one ``{"result": {…}}`` or ``{"error": {…}}``. It
does one job at a time. When stdin ends (the parent is gone), the process ends at once, even in the
middle of a job. A job whose ``parent`` (a process id) is no longer this process's parent is not
begun: another server may use the files by now. Files that a failed job leaves in its ``out`` paths
belong to the parent, which removes them.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obdelta.concurrency.stray_signals import ignore_stray_signals
from obdelta.delta.build import DeltaLayer, Effort, LayerBuilder, LayerFile, Progress
from obdelta.delta.effort import DEFAULT_PRICES
from obdelta.delta.engine_compat import check_addressable
from obdelta.delta.import_foreign import adopt_layers
from obdelta.delta.inflate import import_layer
from obdelta.errors import LayerInvalid, ObdeltaError, WorkerFailed
from obdelta.oci import DiffID, Form
from obdelta.rootfs.bounds import Limits
from obdelta.rootfs.unpack import unpack
from obdelta.store.files import error_for_client

Json = dict[str, Any]
Report = Callable[[Json], None]

PROGRESS_EVERY = 0.25
"""Seconds between two progress lines; a parent needs no more."""


def error_as_json(error: BaseException) -> Json:
    """Returns an error as its class's name and its fields, from which :func:`error_from_json`
    rebuilds it.
    """
    if isinstance(error, OSError):
        error = error_for_client(error)  # without the paths: clients see this text
    elif isinstance(error, MemoryError) or (
        type(error) is RuntimeError and "start new thread" in str(error)
    ):
        error = WorkerFailed("out of memory")
    elif not isinstance(error, ObdeltaError):
        error = WorkerFailed(f"{type(error).__name__}: {error}")
    names = [name for name in inspect.signature(type(error).__init__).parameters if name != "self"]
    values = {name: getattr(error, name) for name in names}
    return {
        "type": type(error).__name__,
        "fields": {
            name: value if isinstance(value, int | None) else str(value)
            for name, value in values.items()
        },
    }


def error_from_json(
    value: Mapping[str, Any], classes: Mapping[str, type[ObdeltaError]]
) -> ObdeltaError:
    """Returns the error that :func:`error_as_json` wrote; ``classes`` by name. An unknown one
    becomes WorkerFailed.
    """
    cls = classes.get(str(value.get("type")))
    fields = value.get("fields")
    if cls is None or not isinstance(fields, dict):
        return WorkerFailed("it answered with an unknown error")
    return cls(**fields)


class _Throttle:
    """Passes on a progress line at most every PROGRESS_EVERY seconds, from any thread."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._next = 0.0

    def __call__(self, value: Json) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + PROGRESS_EVERY
            self._report(value)


def _import(job: Json, report: Report) -> Json:
    throttled = _Throttle(report)
    imported = import_layer(
        Path(job["source"]),
        Path(job["out"]),
        limit=job["limit"],
        progress=lambda done: throttled({"bytes": done}),
        final_size=job.get("coming"),
    )
    expected = DiffID.parse(job["diff_id"])
    if imported.diff_id != expected:
        # The blob has its digest: it is the image that contradicts itself.
        raise LayerInvalid(expected, f"its blob inflates to {imported.diff_id}")
    return {
        "blob_size": imported.blob_size,
        "diff_id": str(imported.diff_id),
        "size": imported.size,
    }


def _layer_file(value: Json) -> LayerFile:
    return LayerFile(DiffID.parse(value["diff_id"]), Path(value["path"]), value["size"])


def _layer_result(path: Path, layer: DeltaLayer) -> Json:
    return {
        "path": str(path),
        "digest": str(layer.digest),
        "size": layer.size,
        "diff_id": str(layer.diff_id),
        "tar_size": layer.tar_size,
        "target": str(layer.target),
        "copies": layer.copies,
        "literals": layer.literals,
        "small_copies": layer.small_copies,
        "literal_bytes": layer.literal_bytes,
        "copied_bytes": layer.copied_bytes,
        "seconds": dict(layer.seconds),
        "excess": layer.excess,
        "lost": layer.lost,
        "explained": None if layer.explained is None else asdict(layer.explained),
    }


def layer_path(stem: Path, number: int) -> Path:
    """Returns the file to which a job writes a delta layer, counted from 0."""
    return stem.with_name(f"{stem.name}-{number}.delta")


def _delta(job: Json, report: Report) -> Json:
    base = [_layer_file(value) for value in job["base"]]
    out_dir = Path(job["out_dir"])
    throttled = _Throttle(report)
    targets: Sequence[Json] = job["targets"]
    form = Form(job["form"])
    index_dir = Path(job["index_dir"]) if job.get("index_dir") else None
    with LayerBuilder(
        base,
        prices=DEFAULT_PRICES | {Form(name): price for name, price in job["prices"].items()},
        effort=Effort(job["effort"]),
        threads=job["threads"],
        index_dir=index_dir,
    ) as builder:
        builder.check_addressable()

        def build(number: int) -> Json:
            value = targets[number]
            target = (
                DiffID.parse(value["diff_id"]) if value.get("path") is None else _layer_file(value)
            )
            out = layer_path(out_dir / job["stem"], number)

            def progress(step: Progress) -> None:
                throttled(
                    {
                        "layer": number,
                        "layers": len(targets),
                        "stage": step.stage,
                        "done": step.done,
                        "of": step.of,
                    }
                )

            return _layer_result(out, builder.build(target, {form: out}, progress)[form])

        with ThreadPoolExecutor(1) as beside:
            # Layers that the base holds whole are only proven. That uses the cores while the other
            # layers' work cannot.
            copied = {
                number: beside.submit(build, number)
                for number, value in enumerate(targets)
                if not value.get("path")
            }
            results = [
                copied[number].result() if number in copied else build(number)
                for number in range(len(targets))
            ]
    return {
        "layers": results,
        "indexes": {"kept": builder.indexes_kept, "made": builder.indexes_made},
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _unpack(job: Json, report: Report) -> Json:
    throttled = _Throttle(report)
    layers = [(DiffID.parse(value["diff_id"]), Path(value["path"])) for value in job["layers"]]
    limits = Limits(size=job["limit"])
    done = unpack(
        layers, Path(job["out"]), limits=limits, progress=lambda size: throttled({"bytes": size})
    )
    return {"entries": done.entries, "size": done.size}


def _ping(job: Json, report: Report) -> Json:
    """Does nothing: the job only shows that a worker process could be started."""
    return {}


def _adopt(job: Json, report: Report) -> Json:
    base = [_layer_file(value) for value in job["base"]]
    check_addressable(base)
    layers = [
        (Path(value["path"]), DiffID.parse(value["diff_id"]), DiffID.parse(value["target"]))
        for value in job["layers"]
    ]
    outs = [layer_path(Path(job["out_dir"]) / job["stem"], n) for n in range(len(layers))]

    def progress(number: int, stage: str) -> None:
        report({"layer": number, "layers": len(layers), "stage": stage})

    adopted = adopt_layers(base, layers, outs, threads=job["threads"], progress=progress)
    results = [
        {
            "path": str(out),
            "digest": str(layer.digest),
            "size": layer.size,
            "diff_id": str(layer.diff_id),
            "tar_size": layer.tar_size,
            "target": str(layer.target),
        }
        for out, layer in zip(outs, adopted, strict=True)
    ]
    return {"layers": results}


TASKS: Mapping[str, Callable[[Json, Report], Json]] = {
    "import": _import,
    "delta": _delta,
    "adopt": _adopt,
    "unpack": _unpack,
    "ping": _ping,
}


def _write(value: Json) -> None:
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _read_jobs(jobs: queue.SimpleQueue[Json]) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)  # the parent is gone: no process waits for a job under way


def main() -> None:
    """Serves jobs until stdin ends. ``argv``: memory limit in bytes (0: none), niceness."""
    ignore_stray_signals()
    memory, niceness = int(sys.argv[1]), int(sys.argv[2])
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    os.nice(niceness)
    # A job makes long lists that live as long as itself. Each collection would walk through all of
    # them again.
    gc.disable()
    jobs: queue.SimpleQueue[Json] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        if job.get("parent", os.getppid()) != os.getppid():
            return
        try:
            result = TASKS[job["task"]](job, lambda value: _write({"progress": value}))
        # Any error of a job is that job's answer, not the worker's end.
        except Exception as error:
            _write({"error": error_as_json(error)})
        else:
            _write({"result": result})
        gc.collect()


if __name__ == "__main__":
    main()
