"""Images of the engine's double: kept in a directory, pulled from a real registry as the device of
``obdelta check`` does, and turned into deltas by Debian's rdiff (librsync itself, with the engine's
block and hash sizes).
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.delta.inflate import import_layer
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.oci import Reference, common_prefix, parse_config

EMPTY_TAR = bytes(1024)


@dataclass
class Kept:
    """An image of the engine: the bytes of its config, its uncompressed layers, and its names."""

    config: bytes
    layers: list[Path]
    names: set[str] = field(default_factory=set)

    @property
    def id(self) -> str:
        return "sha256:" + hashlib.sha256(self.config).hexdigest()


@dataclass
class EngineDouble:
    """``requests`` are the method and path of each request, ``pulls`` the credentials of pulls."""

    folder: Path
    registry: str
    token: Any
    url: str
    kept: dict[str, Kept] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    pulls: list[dict[str, str]] = field(default_factory=list)
    saying: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    flip: bool = False
    """Whether a byte of every delta is wrong."""
    dies: bool = False
    """Whether it stops answering after an interrupted answer, until ``dead`` is set to False."""
    dead: bool = False

    @property
    def images(self) -> list[str]:
        return sorted(self.kept)

    def say(self, what: str, message: dict[str, Any]) -> None:
        """Sends ``message`` in the middle of the next answer to ``pull`` or ``delta``, and ends
        that answer.
        """
        self.saying[what] = message

    def find(self, name: str) -> Kept | None:
        found = [image for image in self.kept.values() if name in image.names or name == image.id]
        return found[0] if found else None

    def pull(self, name: str, credentials: dict[str, str]) -> Kept:
        """Pulls from the registry of this double, whatever host is named: in tests one name leads
        there.
        """
        self.pulls.append(credentials)
        http = Http(timeout=60)
        reference = Reference.parse(name)
        token = credentials.get("registrytoken") or self.token(credentials, reference.repository)
        engine = Engine(http, token=token, registry=self.registry)
        image = engine.pull(reference)
        layers = []
        for blob, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
            packed, path = (
                self.folder / f"{blob.digest.hex}.blob",
                self.folder / f"{diff_id.hex}.tar",
            )
            with self.lock:
                if not path.exists():
                    engine.download(image, blob, packed)
                    import_layer(packed, path, limit=1 << 30)
                    packed.unlink()
            layers.append(path)
        kept = self.kept.setdefault(str(image.config.image_id), Kept(image.config.raw, layers))
        kept.names.add(name)
        return kept

    def delta(self, base: Kept, target: Kept) -> Kept:
        """Makes a delta as the engine does: one signature over the whole base, and one delta for
        each layer after the common ones.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            whole, signature = Path(work) / "base", Path(work) / "signature"
            with whole.open("wb") as out:
                for layer in base.layers:
                    out.write(layer.read_bytes())
            subprocess.run(
                ["rdiff", "-b", "512", "-S", "32", "signature", whole, signature], check=True
            )
            common = common_prefix(
                parse_config(base.config).diff_ids, parse_config(target.config).diff_ids
            )
            layers = []
            for number, layer in enumerate(target.layers):
                content = EMPTY_TAR
                if number >= common:
                    stream = Path(work) / "delta"
                    subprocess.run(["rdiff", "delta", signature, layer, stream], check=True)
                    content = self._packed(stream.read_bytes())
                    stream.unlink()
                path = self.folder / f"{hashlib.sha256(content).hexdigest()}.tar"
                path.write_bytes(content)
                layers.append(path)
        diff_ids = ["sha256:" + path.stem for path in layers]
        assert common == 0 or diff_ids[0] == str(EMPTY_LAYER_DIFF_ID)
        config = {
            "created": "2026-01-01T00:00:00Z",
            "config": {"Labels": {BASE_LABEL: base.id, CONFIG_LABEL: target.config.decode()}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        made = Kept(json.dumps(config).encode(), layers)
        return self.kept.setdefault(made.id, made)

    def _packed(self, stream: bytes) -> bytes:
        if self.flip and len(stream) > 1000:
            middle = len(stream) - 40
            stream = stream[:middle] + bytes([stream[middle] ^ 1]) + stream[middle + 1 :]
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            entry = tarfile.TarInfo("delta")
            entry.size, entry.mode = len(stream), 0o600
            tar.addfile(entry, io.BytesIO(stream))
        # Go's tar writer ends with two blocks; Python's fills a record.
        return out.getvalue()[: 512 + len(stream) + -len(stream) % 512 + 1024]


def saved(image: Kept) -> bytes:
    """Returns an image as ``docker save`` of 20.10 writes it: a directory a layer, links where a
    layer comes twice, the config, the manifest.
    """
    out, seen = io.BytesIO(), dict[Path, str]()
    manifest: dict[str, Any] = {
        "Config": f"{image.id.removeprefix('sha256:')}.json",
        "RepoTags": None,
        "Layers": [],
    }

    def add(name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))

    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, layer in enumerate(image.layers):
            folder = hashlib.sha256(f"{image.id} {number}".encode()).hexdigest()
            add(f"{folder}/VERSION", b"1.0")
            if layer in seen:
                link = tarfile.TarInfo(f"{folder}/layer.tar")
                link.type, link.linkname = tarfile.SYMTYPE, f"../{seen[layer]}/layer.tar"
                tar.addfile(link)
            else:
                add(f"{folder}/layer.tar", layer.read_bytes())
                seen[layer] = folder
            manifest["Layers"].append(f"{folder}/layer.tar")
        add(manifest["Config"], image.config)
        add("manifest.json", json.dumps([manifest]).encode())
    return out.getvalue()
