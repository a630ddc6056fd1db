"""Comparisons of trees, and copies to which a batch may be applied."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.images import Entry
from obdelta.errors import ProofFailed
from obdelta.rootfs import fake_super
from obdelta.rootfs.compare import differences
from obdelta.rootfs.fake_super import StatAttribute
from obdelta.rsync import proof
from tests.support import rootfs
from tests.unit.rootfs.test_engine import layers_with_everything


def everything(out: Path) -> Path:
    return rootfs.tree(
        rootfs.image(layers_with_everything(), out.with_name(f"{out.name}-image")), out
    )


def set_attribute(path: Path, value: bytes) -> None:
    """Sets an attribute without changing the mtime."""
    os.setxattr(path, fake_super.NAME, value)


def relink(path: Path, other: Path) -> None:
    parent = path.parent.stat()
    path.unlink()
    path.hardlink_to(other)
    os.utime(path.parent, ns=(parent.st_mtime_ns, parent.st_mtime_ns))


def unlink_group(path: Path) -> None:
    """Gives one of several names a separate inode."""
    parent, copy = path.parent.stat(), path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)
    os.utime(path.parent, ns=(parent.st_mtime_ns, parent.st_mtime_ns))


def rewrite(path: Path, content: bytes) -> None:
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "mode": (
        lambda root: set_attribute(root / "bin/tool", b"100755 0,0 0:0"),
        ["bin/tool mode", "bin/tool-three mode"],
    ),
    "owner": (lambda root: set_attribute(root / "tmp", b"41777 0,0 0:1"), ["tmp owner"]),
    "device": (
        lambda root: set_attribute(root / "dev/null", b"20666 1,4 0:0"),
        ["dev/null device"],
    ),
    "type": (
        lambda root: set_attribute(root / "dev/pipe", b"140600 0,0 101:102"),
        ["dev/pipe type", "dev/pipe-too type"],
    ),
    "file mtime": (lambda root: os.utime(root / "absolute", ns=(1, 1)), ["absolute mtime"]),
    "directory mtime": (lambda root: os.utime(root / "hidden", (1, 1)), ["hidden mtime"]),
    "root": (lambda root: set_attribute(root, b"40700 0,0 0:0"), [" mode"]),
    "target": (lambda root: rewrite(root / "sbin", b"nib"), ["sbin target"]),
    "content": (lambda root: rewrite(root / "above", b"81"), ["above content"]),
    "size": (lambda root: rewrite(root / "above", b"181"), ["above size"]),
    "links": (lambda root: unlink_group(root / "bin/tool"), ["bin/tool-three links"]),
    "more links": (
        lambda root: relink(root / "absolute", root / "above"),
        ["absolute links", "absolute content"],
    ),
    "extra": (lambda root: (root / "tmp/new").write_bytes(b""), ["tmp mtime", "tmp/new extra"]),  # type: ignore[dict-item]
    "missing": (
        lambda root: shutil.rmtree(root / "opaque/kept"),
        ["opaque mtime", "opaque/kept missing"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_every_difference_is_reported(
    tmp_path: Path, change: Callable[[Path], None], expected: list[str]
) -> None:
    one, other = everything(tmp_path / "one"), everything(tmp_path / "other")
    assert list(differences(one, other)) == []
    change(one)
    assert [
        f"{found.path.decode()} {found.aspect}" for found in differences(one, other)
    ] == expected
    with pytest.raises(ProofFailed) as failed:
        proof.check_result(one, other)
    assert expected[-1].split()[-1] in str(failed.value)
    assert str(tmp_path) not in str(failed.value)


def test_large_files_are_compared_completely(tmp_path: Path) -> None:
    content = bytes(3_000_000)
    trees = [
        rootfs.tree(
            rootfs.image([[rootfs.file("x", content + end)]], tmp_path / end.decode()),
            tmp_path / f"{end!r}",
        )
        for end in (b"1", b"2")
    ]
    assert [one.aspect for one in differences(*trees)] == ["content"]


def test_real_trees_are_compared(tmp_path: Path) -> None:
    """A real tree of root, read without attributes of --fake-super."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "file").write_bytes(b"x")
    (real / "link").symlink_to("file")
    os.mkfifo(real / "fifo", 0o600)
    os.mknod(real / "null", 0o20666, os.makedev(1, 3))
    (real / "file").chmod(0o4755)
    os.chown(real / "fifo", 33, 8)
    for path in (*real.iterdir(), real):
        os.utime(path, (1000, 1000), follow_symlinks=False)
    subprocess.run(["chmod", "666", real / "null"], check=True)
    layers = [
        [
            rootfs.file("file", b"x", mode=0o4755, mtime=1000),
            rootfs.symlink("link", "file", mtime=1000),
            rootfs.fifo("fifo", mode=0o600, owner=(33, 8), mtime=1000),
            rootfs.device("null", 1, 3, tarfile.CHRTYPE, mode=0o666, mtime=1000),
        ]
    ]
    tree = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "tree")
    assert list(differences(real, tree, actual_fake=False)) == []
    assert list(differences(tree, real, expected_fake=False)) == []
    os.chown(real / "link", 1, 1, follow_symlinks=False)
    assert [str(one) for one in differences(real, tree, actual_fake=False)] == [
        "'link' owner: 1:1, expected 0:0"
    ]


def test_additional_hard_links_are_accepted(tmp_path: Path) -> None:
    """As the reference leaves them: same content, same attributes, still linked."""
    linked = rootfs.image([[rootfs.file("a", b"x"), rootfs.hardlink("b", "a")]], tmp_path / "1")
    apart = rootfs.image([[rootfs.file("a", b"x"), rootfs.file("b", b"x")]], tmp_path / "2")
    one, other = rootfs.tree(linked, tmp_path / "linked"), rootfs.tree(apart, tmp_path / "apart")
    proof.check_result(one, other)
    with pytest.raises(ProofFailed, match="links"):
        proof.check_result(other, one)


def test_a_copy_is_equal_and_does_not_change_the_base(tmp_path: Path) -> None:
    base, fresh = everything(tmp_path / "base"), everything(tmp_path / "fresh")
    layers: list[list[Entry]] = [
        *layers_with_everything(),
        [rootfs.file("above", b"other"), rootfs.whiteout("bin")],
    ]
    target = rootfs.tree(rootfs.image(layers, tmp_path / "image"), tmp_path / "target")
    proof.copy_for_proof(base, target, tmp_path / "copy")
    assert list(differences(tmp_path / "copy", base)) == []
    for path in (tmp_path / "copy").rglob("*"):
        if path.is_file():
            path.unlink()
    assert list(differences(base, fresh)) == []


def test_inodes_that_rsync_would_touch_are_copied(tmp_path: Path) -> None:
    """Same size, other attributes: rsync changes those in place. An attribute that says nothing is
    removed.
    """
    layers = [
        [
            rootfs.file("same", b"1", owner=(5, 5)),
            rootfs.file("plain", b"2", owner=(os.getuid(), os.getgid())),
            rootfs.file("touched", b"3", owner=(5, 5)),
            rootfs.file("rewritten", b"4", owner=(5, 5)),
            rootfs.file("gone", b"5"),
        ],
        [
            rootfs.file("touched", b"3", owner=(6, 6)),
            rootfs.file("rewritten", b"44"),
            rootfs.whiteout("gone"),
        ],
    ]
    base = rootfs.tree(rootfs.image(layers[:1], tmp_path / "1"), tmp_path / "base")
    target = rootfs.tree(rootfs.image(layers, tmp_path / "2"), tmp_path / "target")
    proof.copy_for_proof(base, target, tmp_path / "copy")
    shared = {path.name for path in base.iterdir() if path.samefile(tmp_path / "copy" / path.name)}
    # Where files can be cloned, none is shared. The very first file is copied to find that out.
    assert shared <= {"same", "rewritten", "gone"}


@pytest.mark.parametrize(
    "value", [b"", b"100644", b"100644 0,0 0:0 ", b"x 0,0 0:0", b"100644 0,0 0", b"100644 0 0 0:0"]
)
def test_broken_attributes_are_errors(value: bytes) -> None:
    with pytest.raises(ValueError):
        StatAttribute.decode(value)


def test_attributes_with_large_owner_numbers() -> None:
    """rsync once wrote such numbers with a sign."""
    assert StatAttribute.decode(b"100644 0,0 -2:4294967293") == StatAttribute(
        0o100644, 4_294_967_294, 4_294_967_293
    )
