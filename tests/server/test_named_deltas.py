"""Names of deltas: what was named is never 404, and a device may name a delta as what it runs. All
parts are real.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from obdelta.builds.publish_image import delta_tag
from obdelta.delta.build import RECIPE
from obdelta.device.pull import Pulled
from obdelta.oci import Reference
from obdelta.store.catalogue.records import DeltaKey
from tests.server.test_builders import get
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack

UNKNOWN_TAG = "delta-" + "f" * 16
ABSENT = "sha256:" + "f" * 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), pair) as running:
        yield running


def pull(stack: Stack, server: RunningServer, tag: str | None, *repositories: str) -> Pulled:
    """As an engine: HEAD by the tag, GET by the digest, the config; every layer
    must be there, too.
    """
    engine = stack.device(server, *repositories).engine
    image = engine.pull(Reference(server.host, TARGET_REPOSITORY, tag))
    token = stack.token(*repositories)
    for layer in image.manifest.layers:
        assert get(server, f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}", token)[0] == 200
    return image


def is_delta(image: Pulled, pair: Pair) -> bool:
    labels = (image.config.value.get("config") or {}).get("Labels") or {}
    found = "io.resin.delta.config" in labels
    assert found or image.config.image_id == pair.target.image_id
    return found


def named(stack: Stack, server: RunningServer) -> str:
    tag = Reference.parse(stack.name(server)).tag
    assert tag is not None and tag.startswith("delta-")
    return tag


def forget(state: Path, *tables: str) -> None:
    with closing(sqlite3.connect(state / "catalogue.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        for table in tables:
            connection.execute(f"DELETE FROM {table}")
        connection.commit()


# -- what was named is never 404 ---------------------------------------------------------------


def test_a_named_delta_that_was_removed_is_built_again(stack: Stack, pair: Pair) -> None:
    with stack.server("removed") as server:
        tag = named(stack, server)
        before = pull(stack, server, tag)
    forget(stack.root / "removed", "deltas", "asked")
    # A token that does not reach the base gets no delta from it, as before.
    with stack.server("removed") as server:
        path = f"/v2/{TARGET_REPOSITORY}/manifests/{tag}"
        assert get(server, path, stack.token(TARGET_REPOSITORY))[0] == 403
        after = pull(stack, server, tag)
        assert is_delta(after, pair)
        assert after.manifest.digest == before.manifest.digest


def test_after_the_state_was_lost_a_name_is_found_by_its_contents(stack: Stack, pair: Pair) -> None:
    with stack.server("before") as server:
        tag = named(stack, server)
    with stack.server("after") as server:
        assert is_delta(pull(stack, server, tag), pair)
        assert server.log.count("outcome=ready") == 1
    with stack.server("after-too") as server:
        # A token that names the target alone, which nobody has asked for yet: the base cannot be
        # found.
        assert not is_delta(pull(stack, server, tag, TARGET_REPOSITORY), pair)


def test_after_an_upgrade_an_old_name_leads_to_a_new_delta(stack: Stack, pair: Pair) -> None:
    old = delta_tag(DeltaKey("v3", RECIPE - 1, pair.base.digest, pair.target.digest))
    with stack.server("upgraded") as server:
        image = pull(stack, server, old)
        assert is_delta(image, pair)
        assert pull(stack, server, named(stack, server)).manifest.digest == image.manifest.digest
        assert is_delta(pull(stack, server, f"delta-{BASE_REPOSITORY[3:19]}"), pair), (
            "as open-balena-delta names it"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"worth": "0.0001"},
        {"builder": "balena-engine", "docker_host": "unix:///nothing/is/here"},
        {"max_image": "1 KiB"},
    ],
)
def test_a_named_delta_that_cannot_be_built_is_the_targets_own_manifest(
    stack: Stack, pair: Pair, options: dict[str, Any]
) -> None:
    state = f"cannot-{next(iter(options))}"
    with stack.server(state) as server:
        tag = named(stack, server)
    forget(stack.root / state, "deltas")
    with stack.server(state, **options) as server:
        assert not is_delta(pull(stack, server, tag), pair)
        assert "Traceback" not in server.log


def test_a_tag_that_nobody_knows_is_the_images_own_manifest(stack: Stack, pair: Pair) -> None:
    with stack.server("unknown") as server:
        assert not is_delta(pull(stack, server, UNKNOWN_TAG), pair)
        for repository, tag in ((TARGET_REPOSITORY, "another"), ("v2/" + "0" * 32, UNKNOWN_TAG)):
            token = stack.token(repository)
            assert get(server, f"/v2/{repository}/manifests/{tag}", token)[0] == 404
        assert (
            get(
                server,
                f"/v2/{TARGET_REPOSITORY}/manifests/{UNKNOWN_TAG}",
                stack.token(BASE_REPOSITORY),
            )[0]
            == 403
        )


def test_a_published_delta_that_was_deleted_there_is_served_from_here(
    stack: Stack, pair: Pair
) -> None:
    with stack.server("published", publish="registry") as server:
        tag = named(stack, server)
        path = f"/v2/{TARGET_REPOSITORY}/manifests/"
        assert is_delta(pull(stack, server, tag), pair)
        assert get(server, path + tag, stack.token())[0] == 200


# -- a device that names a delta as its source -------------------------------------------------


def back(stack: Stack, server: RunningServer, src: str, version: int = 3) -> tuple[int, str]:
    """The answer to a device that runs the target, under some name, and shall
    go back to the base.
    """
    token = stack.token()
    dest = f"{stack.registry.host}/{BASE_REPOSITORY}"
    path = f"/api/v{version}/delta?src={src}&dest={dest}"
    status, headers, body = get(server, path, token)
    return status, (
        json.loads(body)["name"] if version == 3 and status == 200 else headers.get("location", "")
    )


def names_of(stack: Stack, delta: Pulled, tag: str, pair: Pair) -> list[str]:
    target = f"{stack.registry.host}/{TARGET_REPOSITORY}"
    return [
        f"{target}:{tag}",
        f"{target}:{tag}@{delta.manifest.digest}",
        f"{target}@{delta.manifest.digest}",
        f"{target}@{delta.config.image_id}",
        f"{target}@{pair.target.image_id}",
        str(delta.config.image_id),
        delta.config.image_id.hex,
    ]


def test_a_delta_as_the_source_is_the_image_that_it_leads_to(stack: Stack, pair: Pair) -> None:
    with stack.server("source") as server:
        tag = named(stack, server)
        delta = pull(stack, server, tag)
        status, expected = back(stack, server, stack.names()[1])
        assert status == 200 and ":delta-" in expected
        for name in names_of(stack, delta, tag, pair):
            assert back(stack, server, name) == (200, expected), name
            status, location = back(stack, server, name, version=2)
            assert (status, "signature=" in location) == (300, True), name
        forget_deltas = stack.root / "source"
    forget(forget_deltas, "deltas")
    with stack.server("source") as server:
        status, name = back(stack, server, f"{stack.registry.host}/{TARGET_REPOSITORY}:{tag}")
        assert Reference.parse(name).tag == Reference.parse(expected).tag


def test_a_delta_in_the_registry_is_known_by_its_label(stack: Stack, pair: Pair) -> None:
    with stack.server("pushed", publish="registry") as server:
        tag = named(stack, server)
        delta = stack.device(server).engine.pull(
            Reference(stack.registry.host, TARGET_REPOSITORY, tag)
        )
    with stack.server("another") as server:
        _, expected = back(stack, server, stack.names()[1])
        for name in names_of(stack, delta, tag, pair)[:3]:
            assert back(stack, server, name) == (200, expected), name


def test_a_source_that_is_not_known_ends_in_the_targets_own_name(stack: Stack, pair: Pair) -> None:
    target = f"{stack.registry.host}/{TARGET_REPOSITORY}"
    own = f"{stack.registry.host}/{BASE_REPOSITORY}"
    with stack.server("nowhere") as server:
        # The digest of a layer is no manifest's: the registry answers 500.
        for src in (
            f"{target}:{UNKNOWN_TAG}",
            f"{target}@{ABSENT}",
            ABSENT,
            f"{target}@{pair.target.layers[0].digest}",
        ):
            assert back(stack, server, src) == (200, own), src
            status, location = back(stack, server, src, version=2)
            assert (status, location.rpartition("?")[2]) == (300, "full-pull=yes"), src
        assert "outcome=failed" not in server.log
        for token in (stack.token(TARGET_REPOSITORY), stack.token("v2/" + "9" * 32)):
            assert get(server, f"/api/v3/delta?src={ABSENT}&dest={own}", token)[0] == 403
