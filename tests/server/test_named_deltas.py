"""Names of deltas: a name that was given to a client is never 404, and a device may name a delta
as its current image. All parts are real.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from obdelta.builds.publish.delta_tags import delta_tag
from obdelta.delta.build import RECIPE
from obdelta.device.http import Http
from obdelta.device.pull import PulledImage
from obdelta.oci import Form, Reference
from obdelta.store.catalogue.records import DeltaKey
from tests.server.test_builders import get
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack
from tests.unit.web.test_delta_form import OLD, READ_ZSTD, UNKNOWN

UNKNOWN_TAG = "delta-" + "f" * 16
ABSENT = "sha256:" + "f" * 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stack(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), pair) as running:
        yield running


def pull(stack: Stack, server: RunningServer, tag: str | None, *repositories: str) -> PulledImage:
    """Pulls like an engine: HEAD by the tag, GET by the digest, the config; every layer must
    exist, too.
    """
    engine = stack.device(server, *repositories).engine
    image = engine.pull(Reference(server.host, TARGET_REPOSITORY, tag))
    token = stack.token(*repositories)
    for layer in image.manifest.layers:
        assert get(server, f"/v2/{TARGET_REPOSITORY}/blobs/{layer.digest}", token)[0] == 200
    return image


def is_delta(image: PulledImage, pair: Pair) -> bool:
    labels = (image.config.value.get("config") or {}).get("Labels") or {}
    found = "io.resin.delta.config" in labels
    assert found or image.config.image_id == pair.target.image_id
    return found


def named(stack: Stack, server: RunningServer, form: Form | None = None) -> str:
    tag = Reference.parse(stack.name(server, form)).tag
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
        assert server.log.count("form=gzip outcome=ready") == 1
    with stack.server("after-too") as server:
        # A token that names the target alone, which no client has requested yet: the base cannot
        # be found.
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
        {"max_delta_ratio": "0.0001", "device_link": "metered"},
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


def test_a_form_that_is_too_large_is_not_built_for_each_device(stack: Stack, pair: Pair) -> None:
    """Old engines pull in full then, and newer ones have the other form."""
    with stack.server("both-forms", device_link="metered") as server:
        named(stack, server, Form.ZSTD)
        until_both_forms(server)
    with closing(sqlite3.connect(stack.root / "both-forms" / "catalogue.sqlite")) as connection:
        rows = connection.execute("SELECT form, delta_bytes, full_bytes FROM deltas").fetchall()
    shares = {form: delta_bytes / full_bytes for form, delta_bytes, full_bytes in rows}
    assert shares["zstd"] < shares["gzip"]
    between = f"{(shares['zstd'] + shares['gzip']) / 2:.9f}"
    with stack.server("one-form", max_delta_ratio=between, device_link="metered") as server:
        tag = named(stack, server, Form.ZSTD)
        for _ in range(3):
            assert not is_delta(pull(stack, server, tag), pair)
        new = stack.device(server, form=Form.ZSTD).engine
        assert is_delta(new.pull(Reference(server.host, TARGET_REPOSITORY, tag)), pair)
        assert server.log.count("outcome=ready") == server.log.count("outcome=skipped") == 1


def test_no_old_engine_gets_a_blob_of_zstd_whatever_it_is_called(stack: Stack, pair: Pair) -> None:
    with stack.server("agents") as server:
        tag = named(stack, server, Form.ZSTD)
        image = stack.device(server, form=Form.ZSTD).engine.pull(
            Reference(server.host, TARGET_REPOSITORY, tag)
        )
        assert image.manifest.media_type == Form.ZSTD.traits.manifest_type
        url = f"{server.url}/v2/{TARGET_REPOSITORY}/blobs"
        token = {"Authorization": f"Bearer {stack.token()}"}
        agents = dict.fromkeys(OLD, 404)
        agents |= dict.fromkeys(READ_ZSTD, 200)
        agents |= {agent: 200 for agent in UNKNOWN if agent.isascii() and agent.isprintable()}
        assert len(agents) >= 60
        for agent, status in agents.items():
            for part in (image.manifest.config, image.manifest.layers[-1]):
                with Http(agent).request("HEAD", f"{url}/{part.digest}", token) as answer:
                    assert answer.status == status, agent


def test_a_kill_between_the_builds_of_two_forms_costs_neither(stack: Stack, pair: Pair) -> None:
    with stack.server("between") as server:
        tag = named(stack, server, Form.ZSTD)
        until_both_forms(server)
    with closing(sqlite3.connect(stack.root / "between" / "catalogue.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM deltas WHERE id = (SELECT max(id) FROM deltas)")
        connection.commit()
    with stack.server("between") as server:
        assert named(stack, server) == tag
        for form in Form:
            engine = stack.device(server, form=form).engine
            image = engine.pull(Reference(server.host, TARGET_REPOSITORY, tag))
            assert is_delta(image, pair)
            assert image.manifest.media_type == form.traits.manifest_type


def test_an_unknown_delta_tag_is_the_images_own_manifest(stack: Stack, pair: Pair) -> None:
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


def test_a_published_delta_that_was_deleted_in_the_registry_is_served_from_the_store(
    stack: Stack, pair: Pair
) -> None:
    with stack.server("published", publish="registry") as server:
        tag = named(stack, server)
        path = f"/v2/{TARGET_REPOSITORY}/manifests/"
        assert is_delta(pull(stack, server, tag), pair)
        assert get(server, path + tag, stack.token())[0] == 200


# -- a device that names a delta as its source -------------------------------------------------


def back(stack: Stack, server: RunningServer, src: str, version: int = 3) -> tuple[int, str]:
    """Returns the answer to a device that runs the target, under some name, and should return to
    the base.
    """
    token = stack.token()
    dest = f"{stack.registry.host}/{BASE_REPOSITORY}"
    path = f"/api/v{version}/delta?src={src}&dest={dest}"
    status, headers, body = get(server, path, token)
    return status, (
        json.loads(body)["name"] if version == 3 and status == 200 else headers.get("location", "")
    )


def names_of(stack: Stack, delta: PulledImage, tag: str, pair: Pair) -> list[str]:
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


def test_an_unknown_source_is_answered_with_the_targets_own_name(stack: Stack, pair: Pair) -> None:
    target = f"{stack.registry.host}/{TARGET_REPOSITORY}"
    own = f"{stack.registry.host}/{BASE_REPOSITORY}"
    with stack.server("nowhere") as server:
        # A layer's digest names no manifest: the registry answers 500.
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
