"""Layers made from published packages, tested on packages made here."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench import packages
from bench.layers import Entry, make_layer
from bench.packages import SITE, Package, Unavailable


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def in_a_layer(entries: Iterable[Entry], folder: Path) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Returns the members of a layer made of the entries, with their contents."""
    make_layer(entries, folder / "blobs", tar_path=folder / "tar")
    with tarfile.open(folder / "tar") as tar:
        found = {}
        for info in tar:
            content = tar.extractfile(info) if info.isreg() else None
            found[info.name] = (info, content.read() if content else b"")
        return found


def test_a_debian_package_is_unpacked_unchanged(tmp_path: Path, scratch: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: sample\nVersion: 1:2-3\nArchitecture: all\nMaintainer: nobody"
        " <n@example.com>\nDescription: sample\n"
    )
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "sample").write_bytes(b"\x7fELF" * 1000)
    (root / "usr" / "bin" / "sample").chmod(0o755)
    (root / "usr" / "bin" / "again").hardlink_to(root / "usr" / "bin" / "sample")
    (root / "usr" / "bin" / "link").symlink_to("sample")
    deb = tmp_path / "sample.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", root, deb], check=True, stdout=subprocess.DEVNULL
    )
    found = in_a_layer(packages.entries(Package("deb", "sample", "1:2-3"), deb, scratch), tmp_path)
    assert set(found) == {"usr", "usr/bin", "usr/bin/sample", "usr/bin/again", "usr/bin/link"}
    # The first of the two in the sorted tar holds the bytes, and the other links to it.
    again, content = found["usr/bin/again"]
    assert again.isreg() and content == b"\x7fELF" * 1000 and again.mode == 0o755
    assert (
        found["usr/bin/sample"][0].islnk()
        and found["usr/bin/sample"][0].linkname == "usr/bin/again"
    )
    assert found["usr/bin/link"][0].linkname == "sample"
    assert again.mtime == int((root / "usr" / "bin" / "sample").stat().st_mtime)


def test_a_wheel_is_unpacked_as_an_installer_does(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "sample.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in (
            "sample/__init__.py",
            "sample-1.data/scripts/run",
            "sample-1.data/data/share/x",
            "sample-1.data/purelib/p.py",
        ):
            wheel.writestr(zipfile.ZipInfo(name, (2024, 2, 3, 4, 5, 6)), name.encode())
    found = in_a_layer(packages.entries(Package("wheel", "sample", "1"), path, scratch), tmp_path)
    files = {name: content for name, (info, content) in found.items() if info.isreg()}
    assert files == {
        f"{SITE}/sample/__init__.py": b"sample/__init__.py",
        "usr/local/bin/run": b"sample-1.data/scripts/run",
        "usr/local/share/x": b"sample-1.data/data/share/x",
        f"{SITE}/p.py": b"sample-1.data/purelib/p.py",
    }
    assert found["usr/local/bin/run"][0].mode == 0o755
    assert {info.mtime for info, _ in found.values() if info.isreg()} == {1706933106}


def test_an_npm_package_goes_below_its_own_name(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "sample.tgz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("package/lib/index.js")
        info.size, info.mtime, info.mode, info.uname = 3, 499162500, 0o644, "somebody"
        archive.addfile(info, io.BytesIO(b"1;\n"))
    found = in_a_layer(
        packages.entries(Package("npm", "@scope/sample", "1"), path, scratch), tmp_path
    )
    info, content = found["usr/local/lib/node_modules/@scope/sample/lib/index.js"]
    assert (content, info.mtime, info.uid, info.uname) == (b"1;\n", 499162500, 0, "")


def test_a_fetched_package_is_not_fetched_again(tmp_path: Path) -> None:
    folder = tmp_path / "wheel" / "sample-1"
    folder.mkdir(parents=True)
    (folder / "sample-1.whl").write_bytes(b"")
    assert packages.fetch(Package("wheel", "sample", "1"), tmp_path) == folder / "sample-1.whl"


def test_a_failed_download_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        packages._COMMANDS,
        "deb",
        lambda _: ["sh", "-c", "touch partial; echo no such version >&2; exit 100"],
    )
    with pytest.raises(Unavailable, match="sample 1: no such version"):
        packages.fetch(Package("deb", "sample", "1"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
