"""The number of processor cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Returns the cores of the affinity mask, or fewer if a control group's CPU quota allows
    fewer; at least 1.

    A quota of one and a half cores counts as two. ``root`` contains ``/proc`` and ``/sys``.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yields the quotas of our own control groups and of their parents, in cores."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 2 or "cpu" in controllers.split(","):
            for folder in _folders(root, mounts, version, path):
                quota = _quota_v2(folder) if version == 2 else _quota_v1(folder)
                if quota is not None:
                    yield quota


def _folders(root: Path, mounts: list[str], version: int, path: str) -> Iterator[Path]:
    """Yields the mounted directories of a control group and of its parents (proc(5), mountinfo)."""
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind != ("cgroup2" if version == 2 else "cgroup") or (
            version == 1 and "cpu" not in options.split(",")
        ):
            continue
        mounted, place = fields.split(" ")[3:5]
        top = root / place.lstrip("/")
        # In a container the mount may begin at our own group, whose path is given from the host's
        # view.
        inside = path.removeprefix(mounted.rstrip("/")) if path.startswith(mounted) else "/"
        folder = top / inside.lstrip("/")
        while True:
            yield folder
            if folder == top:
                break
            folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None
    return _ratio(quota, period)


def _ratio(quota: str, period: str) -> float | None:
    try:
        part, whole = int(quota), int(period)
    except ValueError:
        return None
    return part / whole if part > 0 and whole > 0 else None
