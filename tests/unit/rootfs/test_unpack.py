"""Unpacking: hostile layers, limits, and requirements on the file system."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.images import Entry
from obdelta.errors import LayerInvalid, SettingsError
from obdelta.rootfs import fake_super
from obdelta.rootfs.bounds import Limits
from obdelta.rootfs.fake_super import StatAttribute
from obdelta.rootfs.unpack import unpack
from tests.support import rootfs


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Files beside the tree, which a hostile layer would like to reach; they must be unchanged
    afterwards.
    """
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"untouched")
    os.utime(victim / "file", (5, 5))
    os.utime(victim, (5, 5))
    before = (victim / "file").stat(), victim.stat()
    beside = sorted(path.name for path in tmp_path.iterdir())
    yield victim
    after = (victim / "file").stat(), victim.stat()
    for one, other in zip(before, after, strict=True):
        assert (one.st_mode, one.st_nlink, one.st_mtime_ns, one.st_size, one.st_ctime_ns) == (
            other.st_mode,
            other.st_nlink,
            other.st_mtime_ns,
            other.st_size,
            other.st_ctime_ns,
        )
    assert (victim / "file").read_bytes() == b"untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*beside, "image", "out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["root"]


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def attribute(path: Path) -> StatAttribute:
    return StatAttribute.decode(os.getxattr(path, fake_super.NAME))


def test_names_stay_inside_the_tree(tmp_path: Path, outside: Path) -> None:
    """As in an engine's chroot, absolute names and ``..`` end at the root."""
    layers = [
        [
            rootfs.file("/absolute", b"1"),
            rootfs.file("../above", b"2"),
            rootfs.file("a/../../../b", b"3"),
            rootfs.file(f"..{outside}/file", b"4"),
            rootfs.file(f"{outside}/deep/er", b"5"),
            rootfs.hardlink("linked", f"../../..{outside}/file"),
            rootfs.directory("..", mode=0o777),
        ]
    ]
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    inner = root / str(outside)[1:]
    assert {"absolute", "above", "b", "linked"} <= names(root)
    assert (inner / "file").read_bytes() == b"4"
    assert (inner / "file").samefile(root / "linked")
    assert attribute(root).mode == 0o40777


@pytest.mark.parametrize(
    "target", ["{outside}", "../../victim", "../victim", "/proc/self/cwd", "/"]
)
def test_symbolic_links_never_lead_outside(tmp_path: Path, outside: Path, target: str) -> None:
    """A link is followed by entries through it: in the same layer, and in the next."""
    link = rootfs.symlink("link", target.format(outside=outside))
    through = [
        rootfs.file("link/file", b"through"),
        rootfs.symlink("link/another", "/"),
        rootfs.file("link/another/new", b"through two"),
        rootfs.hardlink("hard", "link/file"),
    ]
    within = target.format(outside=outside).replace("../", "").strip("/")
    made = rootfs.image([[rootfs.directory(within or "."), link, *through]], tmp_path / "image")
    root = rootfs.tree(made, tmp_path / "out")
    assert (root / within / "file").read_bytes() == b"through"
    assert (root / "new").read_bytes() == b"through two"
    assert (root / "hard").read_bytes() == b"through"
    assert (root / "link").is_file() and not (root / "link").is_symlink()


def test_links_of_lower_layers_are_not_followed(tmp_path: Path, outside: Path) -> None:
    layers = [
        [rootfs.symlink("link", str(outside)), rootfs.symlink("up", "..")],
        [
            rootfs.file("link/file", b"1"),
            rootfs.whiteout("up/victim"),
            rootfs.file("up/.wh..wh..opq"),
        ],
    ]
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    assert names(root) == {"link", "link/file", "up"}


@pytest.mark.parametrize(
    "entries",
    [
        [rootfs.symlink("a", "b"), rootfs.symlink("b", "a"), rootfs.file("a/x")],
        [rootfs.symlink("a", "a/a"), rootfs.file("a/x")],
        [rootfs.symlink("a", "/" + "x" * 256), rootfs.file("a/x")],
        [rootfs.symlink("a", "x/" * 300), rootfs.file("a/x")],
    ],
    ids=["circle", "itself", "long name", "deep"],
)
def test_long_chains_of_links_are_refused(
    tmp_path: Path, outside: Path, entries: list[Entry]
) -> None:
    with pytest.raises(LayerInvalid):
        rootfs.tree(rootfs.image([entries], tmp_path / "image"), tmp_path / "out")


@pytest.mark.parametrize(
    "entry",
    [
        rootfs.hardlink("x", "/etc/hostname"),
        rootfs.hardlink("x", ".."),
        rootfs.hardlink("x", "directory"),
        rootfs.hardlink("x", "x"),
        rootfs.hardlink("x", "fifo/x"),
        rootfs.hardlink("x", ""),
        rootfs.symlink("x", ""),
        rootfs.symlink("x", "y" * 4096),
        rootfs.file("/", b""),
        rootfs.file("directory/.wh."),
        rootfs.whiteout("directory/."),
        rootfs.whiteout("directory/.."),
        rootfs.file("y" * 256),
        rootfs.file("y/" * 257 + "z"),
        rootfs.file(("y" * 200 + "/") * 20 + "z"),
        rootfs.file("x", owner=(-1, 0)),
        rootfs.file("x", owner=(0, 2**32)),
        rootfs.device("x", 1 << 12, 0),
        rootfs.device("x", 0, 1 << 20),
        rootfs.entry("x", tarfile.CONTTYPE),
        rootfs.file("fifo/x"),
    ],
    ids=lambda entry: f"{entry.info.name[:20]}-{entry.info.type!r}-{entry.info.linkname[:20]}",
)
def test_hostile_entries_are_refused(tmp_path: Path, outside: Path, entry: Entry) -> None:
    entries = [rootfs.directory("directory"), rootfs.fifo("fifo"), entry]
    with pytest.raises(LayerInvalid):
        rootfs.tree(rootfs.image([entries], tmp_path / "image"), tmp_path / "out")


def test_attributes_are_those_of_rsync(tmp_path: Path) -> None:
    layers = [
        [
            rootfs.file("file", b"x", mode=0o4711, owner=(4_294_967_294, 7)),
            rootfs.symlink("link", "target", owner=(1, 2)),
            rootfs.device("null", 1, 5, mode=0o666),
            rootfs.device("disk", 4095, (1 << 20) - 1, tarfile.BLKTYPE, mode=0),
            rootfs.fifo("fifo", mode=0o622),
            rootfs.directory("sticky", mode=0o1777),
        ]
    ]
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    found = {path.name: os.getxattr(path, fake_super.NAME) for path in root.iterdir()}
    assert found == {
        "file": b"104711 0,0 4294967294:7",
        "link": b"120777 0,0 1:2",
        "null": b"20666 1,5 0:0",
        "disk": b"60000 4095,1048575 0:0",
        "fifo": b"10622 0,0 0:0",
        "sticky": b"41777 0,0 0:0",
    }
    assert {path.name: path.stat().st_mode & 0o7777 for path in root.iterdir()} == {
        "file": 0o711,
        "link": 0o777,
        "null": 0o666,
        "disk": 0o600,
        "fifo": 0o622,
        "sticky": 0o777,
    }
    assert (root / "link").read_bytes() == b"target"
    assert [(root / name).stat().st_size for name in ("null", "disk", "fifo")] == [0, 0, 0]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_hard_links_across_layers(tmp_path: Path) -> None:
    """Groups of hard links that are split, joined again, and linked to from upper layers."""
    layers = [
        [
            rootfs.file("a", b"1"),
            rootfs.hardlink("b", "a"),
            rootfs.hardlink("c", "a"),
            rootfs.hardlink("d", "a"),
        ],
        [rootfs.file("b", b"2"), rootfs.whiteout("d")],
        [rootfs.hardlink("e", "a", mode=0o600, owner=(5, 6), mtime=7)],
    ]
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    assert names(root) == {"a", "b", "c", "e"}
    assert (root / "a").samefile(root / "c") and (root / "a").samefile(root / "e")
    assert not (root / "a").samefile(root / "b")
    assert attribute(root / "a") == StatAttribute(0o100600, 5, 6)
    assert (root / "a").stat().st_mtime == 7


def test_leftovers_of_aufs_are_ignored(tmp_path: Path) -> None:
    entries = [
        rootfs.directory(".wh..wh.plnk"),
        rootfs.file(".wh..wh.plnk/123.456", b"x"),
        rootfs.file(".wh..wh.aufs"),
        rootfs.directory("d"),
        rootfs.directory("d/.wh..wh.orph"),
        rootfs.file("d/kept"),
    ]
    root = rootfs.tree(rootfs.image([entries], tmp_path / "image"), tmp_path / "out")
    assert names(root) == {"d", "d/kept"}


def test_mtimes_of_directories_without_an_entry(tmp_path: Path) -> None:
    """They get the newest mtime of their layer, the same every time."""
    layers = [
        [rootfs.file("d/e/f", mtime=1000), rootfs.file("g", mtime=2000)],
        [rootfs.file("d/new", mtime=500)],
        [],
    ]
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    assert {
        str(path.relative_to(root)): path.stat().st_mtime for path in [root, *root.rglob("*")]
    } == {
        ".": 2000,
        "d": 500,
        "d/e": 2000,
        "d/e/f": 1000,
        "d/new": 500,
        "g": 2000,
    }


def test_content_of_all_sizes(tmp_path: Path) -> None:
    sizes = [0, 1, 511, 512, 513, 1 << 18, (1 << 18) + 1, 5_000_000]
    files = {
        f"{size}": bytes([size % 251]) * (size // 2) + os.urandom(size - size // 2)
        for size in sizes
    }
    made = rootfs.image(
        [[rootfs.file(name, content) for name, content in files.items()]], tmp_path / "image"
    )
    seen: list[int] = []
    totals = unpack(rootfs.tars(made), tmp_path / "out", progress=seen.append)
    root = tmp_path / "out/root"
    assert {path.name: path.read_bytes() for path in root.iterdir()} == files
    assert totals == (len(sizes), sum(sizes))
    assert seen[-1] == sum(sizes) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(entries=2), "more than 2 entries"),
        (Limits(size=1_000_000), "more than 1000000 bytes"),
    ],
)
def test_limits_are_enforced(tmp_path: Path, limits: Limits, why: str) -> None:
    """Implied directories count, and so do holes."""
    layers = [[rootfs.file("a/b", b"x")], [rootfs.sparse("hole", 1_000_000, [(0, b"y")])]]
    made = rootfs.image(layers, tmp_path / "image")
    assert unpack(
        rootfs.tars(made), tmp_path / "enough", limits=Limits(entries=3, size=1_000_001)
    ) == (3, 1_000_001)
    with pytest.raises(LayerInvalid, match=why):
        unpack(rootfs.tars(made), tmp_path / "out", limits=limits)


def test_a_truncated_layer_is_refused(tmp_path: Path) -> None:
    made = rootfs.image([[rootfs.file("x", b"x" * 5000)]], tmp_path / "image")
    ((diff_id, path),) = rootfs.tars(made)
    os.truncate(path, 3000)
    with pytest.raises(LayerInvalid, match=str(diff_id)):
        unpack([(diff_id, path)], tmp_path / "out")


def test_a_file_system_without_attributes_is_a_clear_error(tmp_path: Path) -> None:
    made = rootfs.image([[rootfs.file("x")]], tmp_path / "image")
    mount = tmp_path / "ramfs"
    mount.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", mount], check=True)
    try:
        with pytest.raises(OSError) as refused:
            os.setxattr(mount, fake_super.NAME, b"x")
        assert refused.value.errno == errno.ENOTSUP
        with pytest.raises(SettingsError, match=r"state-dir.*extended attributes"):
            unpack(rootfs.tars(made), mount / "out")
        assert list((mount / "out").iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_deep_trees_leave_no_descriptors_open(tmp_path: Path) -> None:
    gc.collect()  # descriptors of earlier tests, closed by the collector, do not count
    before = open_descriptors()
    deep = "/".join("d" * 2 for _ in range(200))
    layers = [[rootfs.file(f"{deep}/{number}", b"x") for number in range(300)] for _ in range(3)]
    layers.append([rootfs.whiteout("dd")])
    root = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "out")
    assert names(root) == set()
    assert open_descriptors() == before
