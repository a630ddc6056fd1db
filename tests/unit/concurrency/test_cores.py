"""CPU quotas of control groups count, not only the affinity mask: tested on a real group of
version 1, and on files with the kernel's contents.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from obdelta.concurrency.cores import available_cores

CORES = len(os.sched_getaffinity(0))
CONTROLLER = Path("/sys/fs/cgroup/cpu")
ASK = (
    "from obdelta.settings import read; print(read({'upstream': 'oci:/x', 'public-url':"
    " 'http://x'}, {}).max_builds)"
)


def made(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """Returns a tree with /proc and /sys as a container sees them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V2 = "30 29 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 29 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = (
    "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n34 29 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup"
    " rw,memory\n"
)


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cores"),
    [
        ("0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "max 100000\n"}, CORES),
        ("0::/a/b\n", V2.format(root="/"), {"sys/fs/cgroup/a/cpu.max": "20000 100000\n"}, 1),
        (
            "0::/a/b\n",
            V2.format(root="/"),
            {"sys/fs/cgroup/other/cpu.max": "20000 100000\n"},
            CORES,
        ),
        # Docker on version 1: the group's path is the host's, and the mount begins at the group.
        (
            "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            V1.format(root="/docker/x"),
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            "3:cpu,cpuacct:/\n",
            V1.format(root="/"),
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            CORES,
        ),
        ("0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "nonsense\n"}, CORES),
        (
            "0::/\n",
            V2.format(root="/"),
            {"sys/fs/cgroup/cpu.max": f"{100000 * CORES * 8} 100000\n"},
            CORES,
        ),
        ("0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "0 0\n"}, CORES),
    ],
)
def test_quotas_of_cgroups_are_read(
    groups: str, mounts: str, files: Mapping[str, str], cores: int, tmp_path: Path
) -> None:
    """Not every machine has version 2 with its cpu controller: files replace the kernel's."""
    assert available_cores(made(tmp_path, groups, OTHER + mounts, files)) == cores


def test_without_proc_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == CORES


def test_a_part_of_a_core_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    files = {"sys/fs/cgroup/cpu.max": "250000 100000\n"}
    assert available_cores(made(tmp_path, "0::/\n", V2.format(root="/"), files)) == 3


def test_a_real_quota_bounds_parallel_builds(tmp_path: Path) -> None:
    """Runs in a control group of version 1 if this machine has its controller, otherwise of
    version 2.
    """
    v1 = CONTROLLER.joinpath("cpu.cfs_period_us").exists() or CONTROLLER.joinpath("tasks").exists()
    folder = (CONTROLLER if v1 else Path("/sys/fs/cgroup")) / f"obdelta-test-{os.getpid()}"
    folder.mkdir()
    try:
        if v1:
            (folder / "cpu.cfs_quota_us").write_text("60000")
        else:
            (folder / "cpu.max").write_text("60000 100000")
        join = f"open({str(folder / 'cgroup.procs')!r}, 'w').write('0');"
        ran = subprocess.run(
            [sys.executable, "-c", join + ASK], capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr
    finally:
        folder.rmdir()
