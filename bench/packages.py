"""Published packages as layer entries: Debian packages, Python wheels, npm packages, each in a
given version.

They are fetched once into a cache, with the registries' ordinary clients (``apt-get download``,
``pip download``, ``npm pack``). Names, modes, mtimes and contents are those in the packages.
"""

from __future__ import annotations

import calendar
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from bench import images
from bench.images import Entry

Source = Literal["deb", "wheel", "npm"]

SITE = "usr/local/lib/python3.11/site-packages"
_PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


class Unavailable(Exception):
    """A package is not available in that version."""


class Package(NamedTuple):
    """One package in one version."""

    source: Source
    name: str
    version: str


def offered(name: str) -> list[str]:
    """Returns the versions of a Debian package that apt offers here, oldest first. Raises
    Unavailable.
    """
    versions = _listed(name)
    if not versions and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        versions = _listed(name)
    if not versions:
        raise Unavailable(f"apt offers no {name}; has `apt-get update` been run?")
    return versions


def _listed(name: str) -> list[str]:
    listed = subprocess.run(
        ["apt-cache", "madison", name], capture_output=True, text=True, check=True
    ).stdout
    versions = [line.split("|")[1].strip() for line in listed.splitlines() if " Packages" in line]
    return list(dict.fromkeys(reversed(versions)))


def fetch(package: Package, cache: Path) -> Path:
    """Returns the package's file, from the cache or its registry. Raises Unavailable."""
    folder = (
        cache
        / package.source
        / f"{package.name.replace('/', '-')}-{package.version.replace(':', '%')}"
    )
    if folder.exists():
        return next(folder.iterdir())
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = _COMMANDS[package.source](package)
        ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if ran.returncode != 0 or not any(Path(scratch).iterdir()):
            raise Unavailable(f"{package.name} {package.version}: {ran.stderr.strip()[-300:]}")
        folder.parent.mkdir(exist_ok=True)
        shutil.copytree(scratch, folder)
    return next(folder.iterdir())


def _apt(package: Package) -> list[str]:
    return [
        "apt-get",
        "download",
        "-qq",
        "-o",
        "APT::Sandbox::User=root",
        f"{package.name}={package.version}",
    ]


def _pip(package: Package) -> list[str]:
    platforms = [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
    which = ["--no-deps", "--only-binary=:all:", "--python-version", "3.11", *platforms]
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        *which,
        f"{package.name}=={package.version}",
    ]


def _npm(package: Package) -> list[str]:
    return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]


_COMMANDS: dict[Source, Callable[[Package], list[str]]] = {"deb": _apt, "wheel": _pip, "npm": _npm}


# -- what is in them ---------------------------------------------------------------------------


def entries(package: Package, file: Path, scratch: Path) -> Iterator[Entry]:
    """Returns the entries that an installation of the package's ``file`` creates in a root.
    ``scratch`` must exist as long as the entries.
    """
    if package.source == "deb":
        return _deb_entries(file, scratch)
    if package.source == "wheel":
        return _wheel_entries(file)
    return _npm_entries(package.name, file, scratch)


def _deb_entries(file: Path, scratch: Path) -> Iterator[Entry]:
    tar = _unpacked(["dpkg-deb", "--fsys-tarfile", str(file)], scratch / f"{file.name}.tar")
    with tarfile.open(tar) as members:
        for member in members:
            member.name = member.name.removeprefix("./")
            if member.islnk():
                member.linkname = member.linkname.removeprefix("./")
            if member.name not in ("", "."):
                yield Entry(member, partial(_Slice, tar, member) if member.isreg() else None)


def _npm_entries(name: str, file: Path, scratch: Path) -> Iterator[Entry]:
    tar = _unpacked(["gzip", "-dc", str(file)], scratch / f"{file.name}.tar")
    with tarfile.open(tar) as members:
        for member in members:
            if member.isreg():
                _, _, inside = member.name.partition("/")  # the archive's own top directory
                info = tarfile.TarInfo(f"usr/local/lib/node_modules/{name}/{inside}")
                info.size, info.mode, info.mtime = member.size, member.mode, member.mtime
                yield Entry(info, partial(_Slice, tar, member))


def _unpacked(command: list[str], tar: Path) -> Path:
    with tar.open("wb") as out:
        subprocess.run(command, stdout=out, check=True)
    return tar


class _Slice:
    """Reads a member's content from the tar at ``path``."""

    def __init__(self, path: Path, member: tarfile.TarInfo) -> None:
        self._file, self._left = path.open("rb"), member.size
        self._file.seek(member.offset_data)

    def read(self, size: int) -> bytes:
        chunk = self._file.read(min(size, self._left))
        self._left -= len(chunk)
        return chunk

    def close(self) -> None:
        self._file.close()


def _wheel_entries(file: Path) -> Iterator[Entry]:
    wheel = zipfile.ZipFile(file)
    for member in wheel.infolist():
        if member.is_dir():
            continue
        mode = (member.external_attr >> 16) & 0o777 or 0o644
        info = tarfile.TarInfo(_installed(member.filename))
        info.size, info.mtime = member.file_size, calendar.timegm((*member.date_time, 0, 0, 0))
        info.mode = 0o755 if info.name.startswith("usr/local/bin/") else mode
        yield Entry(info, partial(wheel.open, member))


def _installed(name: str) -> str:
    """Returns the installed path of a wheel's member (PyPA binary distribution format: the
    ``.data`` directory is spread).
    """
    top, _, rest = name.partition("/")
    if not top.endswith(".data"):
        return f"{SITE}/{name}"
    scheme, _, rest = rest.partition("/")
    return {"scripts": "usr/local/bin/", "data": "usr/local/"}.get(scheme, f"{SITE}/") + rest


def layer_entries(packages: list[Package], cache: Path, scratch: Path) -> list[Entry]:
    """Returns the entries of several packages in one root, sorted; of two with the same name the
    later one stays.
    """
    found = [
        entry for package in packages for entry in entries(package, fetch(package, cache), scratch)
    ]
    return images.tidied(found)
