"""Bases that balena-engine reads differently from their tars (measured) are detected."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from obdelta.delta.build import LayerFile
from obdelta.delta.engine_compat import check_addressable
from obdelta.errors import BaseUnusable
from obdelta.oci import DiffID


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def link(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=to)


def layer(
    path: Path, *entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT
) -> list[LayerFile]:
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return [LayerFile(DiffID.of(path.read_bytes()), path, path.stat().st_size)]


GOOD = {
    "plain": [entry("usr/lib/x", b"x"), link("lib", "usr/lib")],
    "a link beside": [link("lib", "/usr/lib"), entry("libx/y", b"y"), entry("lib2", b"z")],
    "an empty file below a link": [link("lib", "/usr/lib"), entry("lib/x")],
    "long names": [entry("d/" * 120 + "x", b"x"), link("d/" * 119 + "l", "x")],
    "a PAX header": [entry("ä" * 200, b"x", pax_headers={"SCHILY.xattr.user.x": "GNU"})],
}
BAD = {
    "PAX sparse": [
        entry(
            "s",
            b"1\n0\n" + bytes(508),
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        )
    ],
    "below an absolute link": [link("lib", "/usr/lib"), entry("lib/x", b"x")],
    "below a relative link": [entry("d/x", b"1"), link("l", "d"), entry("l/x", b"2")],
    "below it, deeper, with ./": [link("./lib", "/usr/lib"), entry("lib/a/b/x", b"x")],
    "the link comes later": [entry("lib/x", b"x"), link("lib", "/usr/lib")],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_bases_are_accepted(tmp_path: Path, name: str) -> None:
    check_addressable(layer(tmp_path / "tar", *GOOD[name]))
    check_addressable(layer(tmp_path / "gnu", *GOOD[name], format=tarfile.GNU_FORMAT))


@pytest.mark.parametrize("name", BAD)
def test_bases_that_cannot_be_addressed_are_refused(tmp_path: Path, name: str) -> None:
    good = layer(tmp_path / "good", *GOOD["plain"])
    with pytest.raises(BaseUnusable, match="layer 2"):
        check_addressable(good + layer(tmp_path / "tar", *BAD[name]))


def test_old_gnu_sparse_entries_are_detected(tmp_path: Path) -> None:
    with pytest.raises(BaseUnusable, match="sparse"):
        check_addressable(
            layer(
                tmp_path / "tar", entry("s", type=tarfile.GNUTYPE_SPARSE), format=tarfile.GNU_FORMAT
            )
        )
