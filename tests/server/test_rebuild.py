"""A manifest outlives its layers: layers that the quota evicted are rebuilt when a device requests
them, and streamed meanwhile.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bench.images import push
from obdelta.device.http import Http
from obdelta.oci import Form
from tests.support.commands import error_of, run
from tests.support.evicted_layers import (
    ask,
    change,
    get,
    large_layers,
    manifest_of,
    pair,
    path_of,
    registry,
    update,
)
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.processes import until
from tests.support.server import RunningServer, running_server
from tests.support.stack import running_stack

__all__ = ["pair", "registry"]


def evict_layers(server: RunningServer, layers: list[tuple[str, int]]) -> None:
    """Enforces the quota until none of them is stored, as if no device had requested a delta
    within keep-served.
    """
    deadline = time.monotonic() + 60
    while any(path_of(server.state_dir, digest).exists() for digest, _ in layers):
        assert time.monotonic() < deadline, "the layers are still there"
        change(server.state_dir, "UPDATE deltas SET created = 1, last_served = 1")
        request = urllib.request.Request(
            f"{server.operator_url}/api/v1/gc",
            method="POST",
            data=b"{}",
            headers={"content-type": "application/json", **server.key_header},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
        time.sleep(0.1)  # polled: a request that ends now may be recorded once more


SMALL = "1"
"""A quota of one byte: whatever is not protected is evicted."""


@pytest.mark.parametrize("form", Form)
def test_rebuilt_layers_are_byte_identical(form: Form, registry: str, tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=registry, delta_compression=form.value, store_quota=SMALL
    ) as server:
        name = ask(server, form)
        manifest = manifest_of(server, name, form)
        assert manifest["mediaType"] == form.traits.manifest_type
        layers = large_layers(manifest)
        assert len(layers) >= 2
        blobs = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        whole = {digest: get(f"{blobs}/{digest}") for digest, _ in layers}
        evict_layers(server, layers)
        # Each client gets the same name as before, and HEAD rebuilds nothing.
        assert ask(server, form) == name
        assert manifest_of(server, name, form) == manifest
        head = urllib.request.Request(f"{blobs}/{layers[0][0]}", method="HEAD")
        with urllib.request.urlopen(head, timeout=60) as answer:
            assert int(answer.headers["content-length"]) == layers[0][1]
        assert not path_of(server.state_dir, layers[0][0]).exists()
        # From an odd offset in the middle of the last one, as an engine resumes; the same bytes
        # as before.
        digest, size = layers[-1]
        start = random.Random(5).randrange(1, size)
        request = urllib.request.Request(f"{blobs}/{digest}", headers={"range": f"bytes={start}-"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert (answer.status, answer.headers["content-range"]) == (
                206,
                f"bytes {start}-{size - 1}/{size}",
            )
            assert answer.read() == whole[digest][start:]
        assert {digest: get(f"{blobs}/{digest}") for digest, _ in layers} == whole
        # A device gets it too.
        evict_layers(server, layers)
        assert update(server, tmp_path / "device", form)
        until("tmp is empty", lambda: not list((server.state_dir / "tmp").iterdir()))
        counters = json.loads(get(f"{server.operator_url}/api/v1/builds"))
        assert counters["builds"] == []


def test_an_export_of_evicted_layers_says_how_to_get_them(registry: str, tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=registry, delta_compression="gzip", store_quota=SMALL
    ) as server:
        manifest = manifest_of(server, ask(server))
        images = [f"{server.host}/{name}" for name in (BASE_REPOSITORY, TARGET_REPOSITORY)]
        evict_layers(server, large_layers(manifest))
        output = ("-o", tmp_path / "update.tar")
        ran = run("export", *images, *output, "--operator", server.operator_url, status=1)
        assert "was evicted: it is rebuilt when a device requests it" in error_of(ran)
        run("export", *images, *output, "--server", server.url)
        assert (tmp_path / "update.tar").stat().st_size > 4096


OTHER_BASE = "v2/" + "0f" * 16


def layer_answers(
    server: RunningServer, layers: list[tuple[str, int]], token: str
) -> dict[str, tuple[int, bytes]]:
    found = {}
    for digest, _ in layers:
        url = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs/{digest}"
        with Http(timeout=60).request("GET", url, {"Authorization": f"Bearer {token}"}) as answer:
            found[digest] = answer.status, b"".join(answer.chunks())
    return found


@pytest.mark.parametrize("credentials", ["builder", "device"])
def test_every_publication_of_an_evicted_layer_counts(
    pair: Pair, tmp_path: Path, credentials: str
) -> None:
    """Two fleets have the same base in separate repositories, and both may pull the target."""
    with running_stack(tmp_path, pair) as stack:
        push(
            pair.base,
            stack.registry.url,
            OTHER_BASE,
            authorization=stack.push_authorization(OTHER_BASE),
        )
        # The build of another form would remove a whole delta to have room, as it may be now.
        with stack.server(
            upstream_credentials=credentials, delta_compression="gzip", store_quota=SMALL
        ) as server:
            manifests = f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/"
            for base in (BASE_REPOSITORY, OTHER_BASE):
                status, _, body = stack.ask(server, base=base)
                assert status == 200, body
                tag = json.loads(body)["name"].rpartition(":")[2]
                token = stack.token(base, TARGET_REPOSITORY)
                with Http().request(
                    "GET", manifests + tag, {"Authorization": f"Bearer {token}"}
                ) as answer:
                    layers = large_layers(json.loads(b"".join(answer.chunks())))
            neither = stack.token(TARGET_REPOSITORY)
            whole = layer_answers(server, layers, neither)
            assert {status for status, _ in whole.values()} == {200}
            for base in (BASE_REPOSITORY, OTHER_BASE):
                evict_layers(server, layers)
                assert layer_answers(server, layers, stack.token(base, TARGET_REPOSITORY)) == whole
            # Access to neither base: if this server can pull the images itself, it serves them as
            # if the layer were stored; otherwise the answer names no one.
            evict_layers(server, layers)
            answers = layer_answers(server, layers, neither)
            if credentials == "builder":
                assert answers == whole
            else:
                assert {status for status, _ in answers.values()} == {403}
            with Http().request(
                "GET", manifests + tag, {"Authorization": f"Bearer {neither}"}
            ) as answer:
                answers["manifest"] = answer.status, b"".join(answer.chunks())
            assert answers["manifest"][0] == 403
            for _, body in answers.values():
                assert BASE_REPOSITORY.encode() not in body
                assert OTHER_BASE.encode() not in body


def test_a_rebuild_with_other_bytes_never_ends_as_if_complete(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(
        state, upstream=registry, delta_compression="gzip", store_quota=SMALL
    ) as server:
        layers = large_layers(manifest_of(server, ask(server)))
        evict_layers(server, layers)
    # As if the recipe had changed but not its number.
    change(
        state,
        """UPDATE deltas SET details = json_set(details, '$.effort', 'fast') WHERE kind = 'v3'""",
    )
    with running_server(
        state, upstream=registry, delta_compression="gzip", store_quota=SMALL
    ) as server:
        blobs = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        for digest, _ in layers:
            with pytest.raises((OSError, urllib.error.HTTPError)):
                get(f"{blobs}/{digest}")
        # Retired: the next client gets a delta that is right.
        assert update(server, tmp_path / "device")


def test_a_delta_is_rebuilt_with_the_price_that_it_was_built_with(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    # The other form would take the store's few bytes from this one, whenever it is built.
    with running_server(
        state, upstream=registry, device_link="metered", delta_compression="gzip", store_quota=SMALL
    ) as server:
        layers = large_layers(manifest_of(server, ask(server)))
        evict_layers(server, layers)
    with sqlite3.connect(state / "catalogue.sqlite") as connection:
        rows = connection.execute("SELECT json_extract(details, '$.prices.gzip') FROM deltas")
        assert set(rows) == {(0.0,)}
    connection.close()
    with running_server(
        state,
        upstream=registry,
        device_link="10 Mbit/s",
        delta_compression="gzip",
        store_quota=SMALL,
    ) as server:
        blobs = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        for digest, size in layers:
            assert len(get(f"{blobs}/{digest}")) == size
