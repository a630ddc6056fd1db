"""``publish = registry`` with the real server and Debian's docker-registry with token
authentication.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.images import Image, make_image, push
from obdelta import settings
from obdelta.app.access import make_upstream
from obdelta.app.components import Components
from obdelta.app.shared_builds import make_publishers
from obdelta.delta.image import EMPTY_LAYER_DIFF_ID
from obdelta.device.http import Http
from obdelta.errors import SettingsError
from obdelta.oci import Digest, Form
from obdelta.oci.manifest import ACCEPT
from tests.support.clients import running_threads
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.processes import until
from tests.support.stack import Stack, running_stack
from tests.support.store import runtime

TAG = "delta-" + "a1" * 8
"""The tag that open-balena-delta gives to a delta from v2/a1a1…"""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(tmp_path / "stack", make_pair(tmp_path / "pair")) as running:
        yield running


def read(url: str) -> bytes:
    with Http(timeout=30).request("GET", url) as answer:
        return answer.small(1 << 20)


def fetched(stack: Stack, repository: str, selector: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns manifest and config, from the registry itself."""
    headers = {"Authorization": f"Bearer {stack.token(repository)}", "Accept": ", ".join(ACCEPT)}
    base = f"{stack.registry.url}/v2/{repository}"
    with Http(timeout=30).request("GET", f"{base}/manifests/{selector}", headers) as answer:
        assert answer.status == 200
        manifest = json.loads(answer.small(1 << 20))
    with Http(timeout=30).request(
        "GET", f"{base}/blobs/{manifest['config']['digest']}", headers
    ) as answer:
        return manifest, json.loads(answer.small(1 << 20))


def test_devices_get_names_in_the_registry_also_after_the_state_is_lost(
    stack: Stack, tmp_path: Path
) -> None:
    name = f"{stack.registry.host}/{TARGET_REPOSITORY}:{TAG}"
    with stack.server(publish="registry") as server:
        update = stack.update(server, tmp_path / "first")
        assert (update.name, update.is_delta) == (name, True)
        assert update.image_id == stack.pair.target.image_id
        assert f"pushed {name}" in server.log
        # The delta's tag on our own registry API leads to the same image.
        headers = {"Authorization": f"Bearer {stack.token()}", "Accept": ", ".join(ACCEPT)}
        with Http(timeout=30).request(
            "GET", f"{server.url}/v2/{TARGET_REPOSITORY}/manifests/{TAG}", headers
        ) as answer:
            assert json.loads(answer.small(1 << 20)) == fetched(stack, TARGET_REPOSITORY, TAG)[0]
    shutil.rmtree(server.state_dir)
    with stack.server(publish="registry") as server:
        update = stack.update(server, tmp_path / "second")
        assert (update.name, update.is_delta) == (name, True)
        assert "build:" not in server.log and "pushed" not in server.log


def made_elsewhere(
    stack: Stack, tmp_path: Path, repository: str, *, empty: bool = False, **labels: str
) -> Image:
    """Pushes the delta of the target's repository, with an author and perhaps other labels; its
    layers are in ``repository`` too. ``empty``: with an empty layer for the shared one, as
    balena-engine makes it.
    """
    manifest, config = fetched(stack, TARGET_REPOSITORY, TAG)
    if empty:
        config["rootfs"]["diff_ids"][0] = str(EMPTY_LAYER_DIFF_ID)
    config["author"] = "balena-engine"
    config["config"]["Labels"] |= {
        f"io.resin.delta.{name}": value for name, value in labels.items()
    }
    raw = json.dumps(config).encode()
    manifest["config"] |= {"digest": str(Digest.of(raw)), "size": len(raw)}
    for layer in manifest["layers"]:
        mount = (
            f"{stack.registry.url}/v2/{repository}/blobs/uploads/"
            f"?mount={layer['digest']}&from={TARGET_REPOSITORY}"
        )
        headers = {"Authorization": stack.push_authorization(repository, TARGET_REPOSITORY)}
        with Http(timeout=30).request("POST", mount, headers, body=b"") as answer:
            assert answer.status == 201
    made = replace(
        make_image([], tmp_path / "elsewhere"), config=raw, manifest=json.dumps(manifest).encode()
    )
    push(
        made,
        stack.registry.url,
        repository,
        TAG,
        authorization=stack.push_authorization(repository),
    )
    return made


def test_a_valid_delta_that_open_balena_delta_pushed_is_used(stack: Stack, tmp_path: Path) -> None:
    wrong = {
        "": {},
        "it starts from another base": {"base": "sha256:" + "0" * 64},
        "it leads to another target": {"config": "{}"},
        "is gone": {},
        "it has empty layers": {},
    }
    repositories = [f"v2/{number:032x}" for number in range(len(wrong))]
    with stack.server(publish="registry") as server:
        stack.name(server)
        # The same target in other repositories, where another program pushed the delta before us.
        for repository, (why, labels) in zip(repositories, wrong.items(), strict=True):
            authorization = stack.push_authorization(repository)
            push(
                stack.pair.target,
                stack.registry.url,
                repository,
                "latest",
                authorization=authorization,
            )
            peer = made_elsewhere(stack, tmp_path, repository, empty="empty" in why, **labels)
            if why == "is gone":
                gone = json.loads(peer.manifest)["layers"][-2]["digest"].removeprefix("sha256:")
                there = stack.root / "registry/data/docker/registry/v2/repositories" / repository
                (there / f"_layers/sha256/{gone}/link").unlink()
            update = stack.update(
                server, tmp_path / repository.replace("/", "-"), target=repository
            )
            assert update.is_delta and update.name == f"{stack.registry.host}/{repository}:{TAG}"
            assert ("author" in fetched(stack, repository, TAG)[1]) is (why == "")
            assert (f"pushed {update.name}" in server.log) is (why != "") and why in server.log
            # All of them have the same layers.
            assert server.log.count("form=gzip outcome=ready") == 1


def test_other_names_of_the_same_images_are_pushed_too_without_their_layers(
    stack: Stack, tmp_path: Path
) -> None:
    other_base, other_target = "v2/" + "c5" * 16, "org/app"
    for image, repository in ((stack.pair.base, other_base), (stack.pair.target, other_target)):
        authorization = stack.push_authorization(repository)
        push(image, stack.registry.url, repository, "latest", authorization=authorization)
    with stack.server(publish="registry") as server:
        stack.update(server, tmp_path / "first")
        update = stack.update(server, tmp_path / "second", other_base, other_target)
        assert (
            update.name == f"{stack.registry.host}/{other_target}:delta-{'c5' * 8}"
            and update.is_delta
        )
        assert server.log.count("outcome=ready") <= len(Form), "each form is built once"
        (line,) = [line for line in server.log.splitlines() if f"pushed {update.name}:" in line]
        assert "sent=0 bytes=0" in line
        # The base's repository is no hash: the tag is a hash of the contents.
        update = stack.update(server, tmp_path / "third", "org/app", BASE_REPOSITORY)
        assert update.is_delta and len(update.name.rpartition(":delta-")[2]) == 16


def test_a_delta_that_cannot_be_pushed_is_served_from_the_store(
    stack: Stack, tmp_path: Path
) -> None:
    tokens = stack.registry.tokens
    assert tokens is not None
    real = tokens.answer

    def pull_only(authorization: str | None, query: str) -> tuple[int, dict[str, Any]]:
        return real(authorization, query.replace("%2Cpush", ""))

    tokens.answer = pull_only  # type: ignore[method-assign]
    with stack.server(publish="registry") as server:
        update = stack.update(server, tmp_path / "served")
        assert update.is_delta and update.name.startswith(
            f"{server.host}/{TARGET_REPOSITORY}:delta-"
        )
        assert "was not pushed: denied" in server.log
        stack.update(server, tmp_path / "again")
        # Each form is built, and its push refused, once: the second after the first answer.
        until("both pushes are refused", lambda: server.log.count("was not pushed") == 2)
        assert server.log.count("outcome=ready") == 2


def test_a_device_that_leaves_does_not_stop_a_push(stack: Stack) -> None:
    with stack.server(publish="registry") as server:
        source, target = stack.names()
        leaving = socket.create_connection(("127.0.0.1", server.port))
        question = (
            f"GET /api/v3/delta?src={source}&dest={target} HTTP/1.1\r\nHost: {server.host}\r\n"
        )
        leaving.sendall(f"{question}Authorization: Bearer {stack.token()}\r\n\r\n".encode())
        while not json.loads(read(f"{server.operator_url}/api/v1/builds"))["builds"]:
            pass
        leaving.close()
        name = f"{stack.registry.host}/{TARGET_REPOSITORY}:{TAG}"
        # No client waits: only the log shows the end.
        until("it is pushed", lambda: f"pushed {name}" in server.log)
        assert "end=cut" in server.log and stack.name(server) == name


@pytest.mark.parametrize(
    ("upstream", "credentials", "expected"),
    [
        ("oci:/nowhere", "none", "setting publish has the value 'registry'"),
        ("http://registry.example.com", "device", "setting builder-token is missing"),
    ],
)
def test_settings_that_cannot_push_are_refused(
    upstream: str, credentials: str, expected: str
) -> None:
    given = {"publish": "registry", "upstream-credentials": credentials, "auth": "none"}
    configured = settings.read(
        {**given, "upstream": upstream, "public-url": "http://delta.example.com"}, {}
    )
    with running_threads() as threads, pytest.raises(SettingsError, match=expected):
        process = runtime(configured, threads)
        nothing: Any = None
        parts = Components(
            settings=configured,
            reactor=process.reactor,
            threads=threads,
            metrics=process.metrics,
            services=process.services,
            state=nothing,
            upstream=make_upstream(process),
            upstream_blobs=nothing,
            pool=nothing,
            policy=nothing,
            estimates=nothing,
            readiness=nothing,
            lookup=nothing,
            tags=nothing,
            importer=nothing,
            images=nothing,
        )
        make_publishers(parts)
