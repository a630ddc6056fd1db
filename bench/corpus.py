"""The measured pairs of images: two releases each, of published packages, in layers as real images
have them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench import images, packages
from bench.images import Image, Layer
from bench.packages import Package, Source
from obdelta.oci.digest import DiffID, Digest

CACHE = Path(__file__).resolve().parent.parent / ".bench"
_RECIPE = 1
"""Increased whenever the same packages give other layers."""

OLDEST, NEWEST = "oldest", "newest"
"""Versions of Debian packages that are not fixed: apt offers others from day to day."""


class Part(NamedTuple):
    """A package in the versions that the base image and the target image have."""

    source: Source
    name: str
    base: str
    target: str


@dataclass(frozen=True)
class Recipe:
    """How a pair is made; ``layers`` are bottom to top. Only ``counted`` pairs are part of the
    geometric means.
    """

    name: str
    kind: str
    layers: tuple[tuple[Part, ...], ...]
    counted: bool = True


@dataclass(frozen=True)
class Pair:
    """A pair on disk. ``changes`` lists the packages that differ, with their two versions."""

    recipe: Recipe
    base: Image
    target: Image
    changes: tuple[str, ...]

    def repository(self, side: str) -> str:
        """Returns a repository's name as open-balena forms it."""
        return f"v2/{hashlib.sha256(f'{self.recipe.name} {side}'.encode()).hexdigest()[:32]}"


def tar_path(layer: Layer) -> Path:
    """Returns the path of a layer's uncompressed tar."""
    return CACHE / "tars" / layer.diff_id.hex


def _debs(names: str, base: str = NEWEST, target: str = NEWEST) -> tuple[Part, ...]:
    return tuple(Part("deb", name, base, target) for name in names.split())


def _bumped(source: Source, *lines: str) -> tuple[Part, ...]:
    """Parses lines of ``name version`` or ``name base-version target-version``."""
    parts = [line.split() for line in lines]
    return tuple(Part(source, each[0], each[1], each[-1]) for each in parts)


_SYSTEM = (
    "base-files bash coreutils libc6 libc-bin libssl3 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8"
    " libsqlite3-0 libtinfo6 libncursesw6 perl-base dpkg apt libapt-pkg6.0 util-linux mount"
    " libgnutls30 libsystemd0 libudev1 login passwd tar findutils grep sed mawk gpgv liblzma5"
    " libgcrypt20 libzstd1 libbz2-1.0 ca-certificates openssl tzdata"
)
_PYTHON = "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
_SYSTEM_LAYER, _PYTHON_LAYER, _NODE_LAYER = (
    _debs(_SYSTEM),
    _debs(_PYTHON),
    _debs("libnode108 libicu72 nodejs"),
)
_PURE = ("Django 5.1.8", "botocore 1.38.10", "requests 2.32.2", "SQLAlchemy 2.0.40")
_APP = _bumped("wheel", "esphome 2025.4.1")

RECIPES = (
    Recipe(
        "app-only",
        "an application's patch release; everything below is the same",
        (
            _SYSTEM_LAYER,
            _PYTHON_LAYER,
            _bumped("wheel", *_PURE),
            _bumped("wheel", "esphome 2025.4.1 2025.4.2"),
        ),
    ),
    Recipe(
        "go-program",
        "a compiled Go program, next patch version (npm's esbuild binary)",
        (_SYSTEM_LAYER, _bumped("npm", "@esbuild/linux-x64 0.25.3 0.25.4")),
    ),
    Recipe(
        "rust-program",
        "a compiled Rust program, next patch version (PyPI's ruff)",
        (_SYSTEM_LAYER, _bumped("wheel", "ruff 0.11.9 0.11.10")),
    ),
    Recipe(
        "pure-python",
        "mostly pure Python wheels bumped under an unchanged application",
        (
            _SYSTEM_LAYER,
            _PYTHON_LAYER,
            _bumped(
                "wheel",
                "Django 5.1.8 5.2.1",
                "botocore 1.38.10 1.38.20",
                "requests 2.32.2 2.32.3",
                "SQLAlchemy 2.0.40 2.0.41",
            ),
            _APP,
        ),
    ),
    Recipe(
        "npm",
        "npm packages bumped",
        (
            _SYSTEM_LAYER,
            _NODE_LAYER,
            _bumped(
                "npm",
                "typescript 5.8.2 5.8.3",
                "react-dom 19.0.0 19.1.0",
                "core-js 3.41.0 3.42.0",
                "webpack 5.98.0 5.99.0",
                "@node-red/editor-client 4.0.8 4.0.9",
                "axios 1.8.4 1.9.0",
                "date-fns 4.0.0 4.1.0",
            ),
            _bumped("npm", "express 5.0.1 5.1.0"),
        ),
    ),
    Recipe(
        "base-refresh",
        "the Debian base image refreshed under unchanged runtime, wheels and application",
        (_debs(_SYSTEM, OLDEST), _PYTHON_LAYER, _bumped("wheel", *_PURE, "numpy 2.2.5"), _APP),
    ),
    Recipe(
        "wheels",
        "wheels with native code bumped under an unchanged application",
        (
            _SYSTEM_LAYER,
            _PYTHON_LAYER,
            _bumped(
                "wheel",
                "numpy 2.2.5 2.2.6",
                "cryptography 44.0.2 44.0.3",
                "pillow 11.1.0 11.2.1",
                "lxml 5.3.1 5.4.0",
                "pydantic-core 2.33.1 2.33.2",
                "psutil 6.1.1 7.0.0",
            ),
            _APP,
        ),
    ),
    Recipe(
        "debian",
        "a layer of Debian packages, stable release against its updates",
        (
            _SYSTEM_LAYER,
            _debs(
                "curl libcurl4 openssl git openssh-client perl-modules-5.36 libperl5.36 nginx"
                " nginx-common php8.2-cli php8.2-common php8.2-opcache systemd libglib2.0-0 libxml2"
                " bind9-libs libnode108",
                OLDEST,
            ),
            _APP,
        ),
    ),
    Recipe(
        "go-daemon",
        "a Go daemon rebuilt with security fixes (Debian's containerd)",
        (_SYSTEM_LAYER, _debs("containerd", OLDEST)),
    ),
    Recipe(
        "many-files",
        "a large pure Python application's patch release: 36,000 small files",
        (_SYSTEM_LAYER, _PYTHON_LAYER, _bumped("wheel", "homeassistant 2024.3.1 2024.3.3")),
    ),
    Recipe(
        "java",
        "a Java runtime, next security release",
        (_SYSTEM_LAYER, _debs("openjdk-17-jre-headless", OLDEST), _APP),
    ),
    Recipe(
        "browser",
        "a browser, several releases on",
        (_SYSTEM_LAYER, _debs("chromium chromium-common", OLDEST), _APP),
    ),
    Recipe(
        "large",
        "1 GB: native wheels for machine learning and a Java runtime bumped",
        (
            _SYSTEM_LAYER,
            _debs(_PYTHON, OLDEST),
            _debs("openjdk-17-jre-headless", OLDEST),
            _bumped(
                "wheel",
                "numpy 2.2.5 2.2.6",
                "scipy 1.15.2 1.15.3",
                "pandas 2.2.2 2.2.3",
                "pyarrow 19.0.1 20.0.0",
                "scikit-learn 1.6.0 1.6.1",
                "onnxruntime 1.21.0 1.21.1",
            ),
            _bumped(
                "wheel",
                "opencv-python-headless 4.10.0.84 4.11.0.86",
                "polars 1.28.0 1.29.0",
                "duckdb 1.2.1 1.2.2",
            ),
            _APP,
        ),
        counted=False,
    ),
)
"""The recipes, small ones first."""


def build(recipe: Recipe) -> Pair:
    """Returns the pair, from the cache or built. Raises packages.Unavailable."""
    sides: dict[str, list[Layer]] = {"base": [], "target": []}
    changes: list[str] = []
    for parts in recipe.layers:
        settled = [_settled(part) for part in parts]
        changes += [
            f"{part.name} {part.base} → {part.target}"
            for part in settled
            if part.base != part.target
        ]
        sides["base"].append(
            _layer([Package(part.source, part.name, part.base) for part in settled])
        )
        sides["target"].append(
            _layer([Package(part.source, part.name, part.target) for part in settled])
        )
    if not changes:
        raise packages.Unavailable(f"{recipe.name}: apt offers one version only of each package")
    made = {
        side: images.make_image(
            layers,
            CACHE / "images" / recipe.name / side,
            labels={"pair": recipe.name, "side": side},
        )
        for side, layers in sides.items()
    }
    return Pair(recipe, made["base"], made["target"], tuple(changes))


def _settled(part: Part) -> Part:
    return part._replace(base=_version(part, part.base), target=_version(part, part.target))


def _version(part: Part, wanted: str) -> str:
    """Returns a package's version; Debian versions are fixed once for each cache, so that its
    pairs stay the same.
    """
    if wanted not in (OLDEST, NEWEST):
        return wanted
    settled = CACHE / "versions.json"
    known: dict[str, list[str]] = json.loads(settled.read_bytes()) if settled.exists() else {}
    if part.name not in known:
        known[part.name] = packages.offered(part.name)
        settled.parent.mkdir(exist_ok=True)
        settled.write_text(json.dumps(known, indent=1))
    return known[part.name][0 if wanted == OLDEST else -1]


def _layer(contents: Sequence[Package]) -> Layer:
    """Returns a layer with its tar beside it, made once for its packages."""
    key = hashlib.sha256(json.dumps([_RECIPE, contents]).encode()).hexdigest()
    record = CACHE / "layers" / f"{key}.json"
    if record.exists():
        fields = json.loads(record.read_bytes())
        fields.update(
            path=CACHE / "blobs" / fields["digest"],
            digest=Digest(fields["digest"]),
            diff_id=DiffID(fields["diff_id"]),
        )
        return Layer(**fields)
    for folder in ("tars", "layers"):
        (CACHE / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        found = packages.layer_entries(list(contents), CACHE / "packages", Path(scratch))
        tar = Path(scratch) / "tar"
        layer = images.make_layer(found, CACHE / "blobs", tidy=False, tar_path=tar)
        tar.replace(tar_path(layer))
    fields = asdict(layer) | {
        "path": None,
        "digest": layer.digest.hex,
        "diff_id": layer.diff_id.hex,
    }
    record.write_text(json.dumps(fields))
    return layer
