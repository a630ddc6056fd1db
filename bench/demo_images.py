"""The two releases of the demo, as images made of real files."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import images, packages
from bench.images import Entry, Image
from bench.packages import Package

HOST = "registry.example.com"
"""The registry's name in image references; nothing connects to it."""


class Bump(NamedTuple):
    """A package in the two releases."""

    name: str
    old: str
    new: str


NATIVE = (
    Bump("cryptography", "44.0.2", "44.0.3"),
    Bump("pydantic-core", "2.33.0", "2.33.1"),
    Bump("numpy", "2.2.5", "2.2.6"),
)
PURE = (
    Bump("twisted", "24.10.0", "24.11.0"),
    Bump("requests", "2.32.3", "2.32.4"),
    Bump("jinja2", "3.1.5", "3.1.6"),
)
UNCHANGED = (Bump("babel", "2.17.0", "2.17.0"), Bump("certifi", "2025.1.31", "2025.1.31"))

APP = '''"""A small application, release {release}."""

import numpy
import requests

BATCH = {batch}


def collect(address: str) -> float:
    """The mean of what a sensor has to say."""
    readings = requests.get(address, timeout=10).json()["readings"]
    return float(numpy.mean(readings[:BATCH]))
'''


class Release(NamedTuple):
    """One of the two images. ``name`` is its repository; ``reference`` has the digest, too."""

    image: Image
    name: str
    reference: str


def make_releases(upstream: Path, downloads: Path) -> tuple[Release, Release]:
    """Makes both images in a folder of OCI layouts: standard library, native wheels, pure wheels,
    app, and wheels that stay.
    """
    blobs = upstream / ".blobs"
    library = images.make_layer(standard_library(), blobs)
    with tempfile.TemporaryDirectory() as scratch:
        unchanged = images.make_layer(wheels(UNCHANGED, False, downloads, Path(scratch)), blobs)
        found = []
        for number, is_new in enumerate((False, True), 1):
            layers = [
                library,
                images.make_layer(wheels(NATIVE, is_new, downloads, Path(scratch)), blobs),
                images.make_layer(wheels(PURE, is_new, downloads, Path(scratch)), blobs),
                images.make_layer(application(number), blobs),
                unchanged,
            ]
            name = f"demo/release-{number}"
            labels = {
                "io.balena.app-name": "demo",
                "io.balena.service-name": "collector",
                "io.balena.release-version": f"1.0.{number}",
            }
            image = images.make_image(layers, upstream / name, labels=labels)
            found.append(Release(image, f"{HOST}/{name}", f"{HOST}/{name}@{image.digest}"))
    return found[0], found[1]


def standard_library() -> list[Entry]:
    """Returns the files of Python's standard library, without what is installed into it or
    compiled from it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    entries = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - left_out)
        inside = f"usr/local/lib/python3.11/{Path(folder).relative_to(root)}".removesuffix("/.")
        entries.append(images.directory(inside))
        entries += [
            images.file(f"{inside}/{name}", path)
            for name in sorted(names)
            if (path := Path(folder, name)).is_file() and not path.is_symlink()
        ]
    return entries


def wheels(bumps: tuple[Bump, ...], is_new: bool, downloads: Path, scratch: Path) -> list[Entry]:
    """Returns the files that one release's packages install."""
    wanted = [Package("wheel", bump.name, bump.new if is_new else bump.old) for bump in bumps]
    return packages.layer_entries(wanted, downloads, scratch)


def application(release: int) -> list[Entry]:
    """Returns a few files of which a line or two change."""
    main = APP.format(release=release, batch=100 * release).encode()
    return [
        images.directory("app"),
        images.file("app/collect.py", main),
        images.file("app/VERSION", f"1.0.{release}\n".encode()),
        images.symlink("app/current", "collect.py"),
    ]
