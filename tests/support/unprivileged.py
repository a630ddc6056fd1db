"""Makes v2 streams as an ordinary user, without root's privileges: ``nobody``, in a process
without capabilities.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bench.images import Image
from tests.support import rootfs
from tests.support.server import RunningServer, launcher, running_server

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65534
AS_NOBODY = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--no-new-privs",
    "--inh-caps=-all",
]
_MAKE = """
import json, os, subprocess, sys
from pathlib import Path
from obdelta.oci import DiffID
from obdelta.rootfs.unpack import unpack
job = json.load(sys.stdin)
assert os.geteuid() == 65534
for name, layers in job["images"].items():
    unpack([(DiffID.parse(diff_id), Path(path)) for diff_id, path in layers], Path(name))
recorder = [sys.executable, "-m", "obdelta.rsync.recorder"]
with subprocess.Popen(recorder, stdin=subprocess.PIPE, text=True) as child:
    child.stdin.write(json.dumps(job["order"]) + "\\n")
    child.stdin.flush()
    sys.exit(child.wait())
"""


@cache
def nobodys_python() -> str:
    """Returns an interpreter that ``nobody`` may run, since ours may be in root's home."""
    for python in (sys.executable, "/usr/bin/python3"):
        ask = "import sys; sys.exit(sys.version_info < (3, 11))"
        # Run by a shell of that user: setpriv itself can still run programs that only root may
        # run.
        ran = subprocess.run(
            [*AS_NOBODY, "sh", "-c", f"exec {python} -c '{ask}'"], capture_output=True, check=False
        )
        if ran.returncode == 0:
            return python
    raise AssertionError("nobody has no Python of version 3.11 or later here")


@contextmanager
def nobodys_directory() -> Iterator[Path]:
    """Makes a directory that belongs to ``nobody``, with a copy of our package. pytest's own
    directories are closed to other users.
    """
    path = Path(tempfile.mkdtemp(prefix="nobody-"))
    try:
        shutil.copytree(
            ROOT / "obdelta",
            path / "obdelta",
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c"),
        )
        path.chmod(0o755)
        os.chown(path, NOBODY, NOBODY)
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def nobodys_server(
    *, port: int | None = None, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[RunningServer]:
    """Runs the whole server as ``nobody``, on copies of its code and its dependencies.

    Otherwise like :func:`tests.support.server.running_server`; its state and log are removed
    afterwards.
    """
    with nobodys_directory() as directory:
        for name in ("twisted", "obdelta"):
            shutil.copytree(ROOT / name, directory / name, dirs_exist_ok=True)
        packages = directory / "packages"
        unused = shutil.ignore_patterns(
            "pip", "mypy*", "*__mypyc*", "ruff*", "pytest*", "hypothesis*", "__pycache__", "tests"
        )
        shutil.copytree(
            sysconfig.get_path("purelib"), packages, ignore=unused, copy_function=_linked
        )

        def command(*arguments: str, constants: Mapping[str, float] | None = None) -> list[str]:
            return [
                *AS_NOBODY,
                nobodys_python(),
                "-c",
                launcher(constants or {}),
                "-n",
                "--pidfile=",
                "obdelta",
                *arguments,
            ]

        own = {
            "PYTHONPATH": f"{directory}:{packages}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(directory),
        }
        with running_server(
            directory / "state",
            port=port,
            run=command,
            environment={**(environment or {}), **own},
            **options,
        ) as server:
            status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
            assert f"\nUid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t" in status
            assert "\nCapEff:\t0000000000000000\n" in status
            yield server


def _linked(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def make_stream(
    base: Image, target: Image, out: Path, *, docker_config: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Unpacks both images, and records and proves ``out/stream``, all as ``nobody``. Returns the
    recorder's reports.

    ``out`` belongs to ``nobody``. The trees stay in ``out/base/root`` and ``out/target/root``.
    """
    images: dict[str, list[tuple[str, str]]] = {}
    for name, image in (("base", base), ("target", target)):
        images[name] = []
        for diff_id, path in rootfs.tars(image):
            copy = out / f"{diff_id.hex}.tar"
            shutil.copyfile(path, copy)
            images[name].append((str(diff_id), str(copy)))
    order = {
        "base": str(out / "base/root"),
        "target": str(out / "target/root"),
        "docker_config": docker_config,
        "out": str(out / "stream"),
        "scratch": str(out / "scratch"),
        "level": 6,
        "block": 512,
        "forecast": False,
        "niceness": 0,
    }
    ran = subprocess.run(
        [*AS_NOBODY, nobodys_python(), "-c", _MAKE],
        cwd=out,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(out), "PYTHONDONTWRITEBYTECODE": "1"},
        input=json.dumps({"images": images, "order": order}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stderr == "", ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]
