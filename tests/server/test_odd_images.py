"""Odd images on the real server: formats, sizes, bombs, and images of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.images import (
    Compression,
    Format,
    Image,
    Layer,
    file,
    make_image,
    make_index,
    make_layer,
    push,
)
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.oci import Reference
from tests.server.test_v3 import ask, get
from tests.support.images import Pair
from tests.support.layout_server import BASE, TARGET, names, pair, server, update
from tests.support.processes import until
from tests.support.registry import running_registry
from tests.support.server import RunningServer, running_server

__all__ = ["pair", "server"]


def files_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file()]


class Shelf:
    """Makes images for one ``oci:`` upstream."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0

    def layer(self, *contents: bytes, compression: Compression = "gzip") -> Layer:
        entries = [file(f"f{number}", content) for number, content in enumerate(contents)]
        return make_layer(entries, self.root / ".blobs", compression=compression)

    def image(
        self, layers: Sequence[Layer], *, format: Format = "docker", label: str = ""
    ) -> tuple[str, Image]:
        self._number += 1
        repository = f"v2/{self._number:032x}"
        return repository, make_image(
            layers, self.root / repository, format=format, labels={"label": label}
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    (root / ".blobs").mkdir()
    return Shelf(root)


@pytest.fixture(scope="module")
def shelf_server(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(
        tmp_path_factory.mktemp("run") / "state", upstream=f"oci:{shelf.root}"
    ) as running:
        yield running


def noise(seed: str, size: int = 50_000) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(size)


def edited(content: bytes) -> bytes:
    return content[:1000] + b"edited" + content[1000:]


@pytest.mark.parametrize("format", ["docker", "oci"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_all_manifest_formats_are_read(
    shelf: Shelf,
    shelf_server: RunningServer,
    tmp_path: Path,
    format: Format,
    compression: Compression,
) -> None:
    if format == "docker" and compression != "gzip":
        format = "oci"  # Docker's schema has a name for gzip only
    content = noise(f"{format} {compression}")
    base, _ = shelf.image([shelf.layer(content, compression=compression)], format=format)
    target, _ = shelf.image(
        [
            shelf.layer(edited(content), compression=compression),
            shelf.layer(b"more", compression=compression),
        ],
        format=format,
    )
    done = update(shelf_server, tmp_path / "device", base, target)
    assert done.is_delta
    assert done.pulled_bytes < 10_000


def test_an_index_with_one_platform_is_that_image(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    content = noise("index")
    base, _ = shelf.image([shelf.layer(content)])
    target, image = shelf.image([shelf.layer(edited(content))])
    make_index([(image, {"os": "linux", "architecture": "arm64"})], shelf.root / target)
    status, body = ask(shelf_server, *names(shelf_server, base, target))
    assert status == 200
    name = Reference.parse(json.loads(body)["name"])
    assert name.tag is not None
    assert name.tag.startswith("delta-")
    assert (
        Engine(Http(), registry=shelf_server.url)
        .pull(name)
        .config.value["config"]["Labels"]["io.resin.delta.config"]
        .encode()
        == image.config
    )


def test_layers_that_repeat_and_layers_that_are_empty(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    content = noise("repeat")
    one, other, empty = shelf.layer(content), shelf.layer(edited(content), b"x"), shelf.layer()
    base, _ = shelf.image([one, empty, one, empty])
    target, _ = shelf.image([one, other, empty, other, one, empty, one])
    done = update(shelf_server, tmp_path / "device", base, target)
    assert done.is_delta
    assert done.pulled_bytes < 10_000


def test_a_delta_without_common_layers_is_too_large(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    base, _ = shelf.image([shelf.layer(noise("this"))])
    target, _ = shelf.image([shelf.layer(noise("that"))])
    assert not update(shelf_server, tmp_path / "device", base, target).is_delta
    assert "category=not-worth" in shelf_server.log


def test_another_config_on_the_same_layers_fetches_nothing(shelf: Shelf, tmp_path: Path) -> None:
    layers = [shelf.layer(noise("config")), shelf.layer(b"small")]
    base, _ = shelf.image(layers, label="one")
    target, _ = shelf.image(layers, label="two")
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}") as server:
        assert not update(server, tmp_path / "device", base, target).is_delta
        assert files_in(server.state_dir / "layers") == []


def test_sixty_layers(shelf: Shelf, shelf_server: RunningServer, tmp_path: Path) -> None:
    contents = [noise(f"layer {number}", 5_000) for number in range(60)]
    base, _ = shelf.image([shelf.layer(content) for content in contents])
    target, _ = shelf.image(
        [shelf.layer(edited(content) if n % 3 else content) for n, content in enumerate(contents)]
    )
    assert update(shelf_server, tmp_path / "device", base, target).is_delta


def test_many_small_bombs_are_limited_together(shelf: Shelf, shelf_server: RunningServer) -> None:
    """Each of these layers may inflate to its size; an image of hundreds would fill the disk at
    the cost of a few MB.
    """
    base, _ = shelf.image([shelf.layer(noise("bombs"))])
    target, _ = shelf.image([shelf.layer(bytes([number]) + bytes(24 << 20)) for number in range(5)])
    status, body = ask(shelf_server, *names(shelf_server, base, target))
    assert (status, json.loads(body)["name"]) == (200, names(shelf_server, base, target)[1])
    assert "bytes together" in shelf_server.log
    # Other forms of earlier tests' deltas may still be built.
    until("nothing is left", lambda: not files_in(shelf_server.state_dir / "tmp"), 60)


def test_an_image_larger_than_max_image(shelf: Shelf, tmp_path: Path) -> None:
    contents = [noise(f"part {number}") for number in range(8)]
    base, _ = shelf.image([shelf.layer(content) for content in contents])
    target, _ = shelf.image([shelf.layer(edited(content)) for content in contents])
    for most, too_large in (("128 KiB", True), ("1 MiB", False)):
        with running_server(
            tmp_path / most[:3], upstream=f"oci:{shelf.root}", max_image=most
        ) as server:
            assert ask(server, *names(server, base, target))[0] == 200
            assert ("category=image-unusable" in server.log) == too_large


def test_equal_contents_in_other_repositories_share_a_delta_but_no_access(
    shelf: Shelf, tmp_path: Path
) -> None:
    content = noise("twice")
    layers = [shelf.layer(content)], [shelf.layer(edited(content))]
    (base, _), (target, _) = (shelf.image(one) for one in layers)
    (other_base, _), (other_target, other_image) = (shelf.image(one) for one in layers)
    stranger, strange_image = shelf.image(layers[1])
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}") as server:
        port = server.port
        first = update(server, tmp_path / "first", base, target)
        tag = Reference.parse(first.name).tag
        for repository, own in ((other_target, other_image), (stranger, strange_image)):
            # No byte of the delta: the repository's own image, as for any unknown delta tag.
            status, _, body = get(f"{server.url}/v2/{repository}/manifests/{tag}")
            assert (status, hashlib.sha256(body).hexdigest()) == (200, own.digest.hex)
        second = update(server, tmp_path / "second", other_base, other_target)
        assert Reference.parse(second.name) == Reference(server.host, other_target, tag)
    with running_server(tmp_path / "state", upstream=f"oci:{shelf.root}", port=port) as server:
        digests = set()
        for repository in (target, other_target):
            image = Engine(Http(), registry=server.url).pull(
                Reference(server.host, repository, tag)
            )
            digests.add(image.manifest.digest)
            assert (
                get(f"{server.url}/v2/{repository}/blobs/{image.manifest.layers[0].digest}")[0]
                == 200
            )
            assert (
                get(f"{server.url}/v2/{stranger}/blobs/{image.manifest.layers[0].digest}")[0] == 404
            )
        assert len(digests) == 1
        assert get(f"{server.url}/v2/{stranger}/manifests/{digests.pop()}")[0] == 404
        assert server.log.count("form=gzip outcome=ready") == 1


def test_a_config_that_claims_a_foreign_layer_gets_no_bytes_of_it(
    shelf: Shelf, shelf_server: RunningServer, tmp_path: Path
) -> None:
    """The secret's diff_id is known and its layer cached. A client that claims this diff_id for
    its own blob gets an error, not bytes.
    """
    secret, own = shelf.layer(noise("secret")), shelf.layer(noise("own"))
    base, _ = shelf.image([secret])
    target, _ = shelf.image([shelf.layer(edited(noise("secret")))])
    assert update(shelf_server, tmp_path / "device", base, target).is_delta
    rootfs = {"type": "layers", "diff_ids": [str(secret.diff_id)]}
    claimed = f"v2/{'e' * 32}"
    make_image([own], shelf.root / claimed, config={"rootfs": rootfs})
    status, body = ask(shelf_server, *names(shelf_server, claimed, target))
    assert (status, json.loads(body)["name"]) == (200, names(shelf_server, claimed, target)[1])
    assert "its blob inflates to" in shelf_server.log


def test_a_manifest_that_names_a_foreign_blob_gets_no_bytes_of_it(
    pair: Pair, shelf: Shelf, tmp_path: Path
) -> None:
    """A registry does not check that a repository has a blob when its manifest gives URLs for it.

    A client that knows only a digest could otherwise read cached bytes of another fleet, as
    literals of a delta between its own images.
    """
    own = noise("own", 200_000)
    secret = pair.target.layers[2]
    with running_registry(tmp_path / "registry") as registry:
        push(pair.base, registry.url, BASE)
        push(pair.target, registry.url, TARGET)
        base, before = shelf.image([shelf.layer(own)])
        target, after = shelf.image([secret, shelf.layer(edited(own))])
        value = json.loads(after.manifest)
        value["layers"][0]["urls"] = ["http://example.com/"]
        push(before, registry.url, base)
        push(
            replace(after, manifest=json.dumps(value).encode(), layers=after.layers[1:]),
            registry.url,
            target,
        )
        with running_server(
            tmp_path / "state", upstream=registry.url, max_delta_ratio="0.99"
        ) as server:
            assert update(server, tmp_path / "victim").is_delta
            src, dest = names(server, base, target)
            status, body = ask(server, src, dest)
            assert (status, json.loads(body)["name"]) == (
                200,
                dest,
            ), "a full pull, in which the registry refuses the blob"
            assert get(f"{server.url}/v2/{target}/blobs/{secret.digest}")[0] == 404
            # The same for v2: the victim's root filesystem is unpacked, and its layers are known.
            assert (
                get(f"{server.url}/api/v2/delta?src={names(server)[0]}&dest={names(server)[1]}")[0]
                == 300
            )
            _, headers, _ = get(f"{server.url}/api/v2/delta?src={src}&dest={dest}")
            assert headers["location"].endswith("full-pull=yes")
