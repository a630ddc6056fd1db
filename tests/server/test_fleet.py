"""Deltas before devices ask, on a real server before a real registry; openBalena's API is the
tests' double.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bench.images import file, make_image, make_layer
from tests.support.fleet_server import (
    PASSWORD,
    SOURCES,
    TARGET,
    call,
    fleet,
    in_registry,
    leave,
    prune,
    push_image,
    run_prune,
    serving,
    source,
    until_unprotected,
)
from tests.support.images import make_pair
from tests.support.openbalena_api import TOKEN, OpenBalenaApi, running_api
from tests.support.processes import until
from tests.support.stack import Stack, running_stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A registry with forty releases of one service, and the one that follows them."""
    root = tmp_path_factory.mktemp("fleet")
    pair = make_pair(root / "pair", size=32 << 10)
    with running_stack(root / "stack", pair) as running:
        for number in range(SOURCES):
            own = make_layer([file("app/number", b"%d\n" % number * 2000)], root / "blobs")
            image = make_image([*pair.base.layers, own], root / f"image-{number}")
            push_image(running, image, source(number))
        push_image(running, pair.target, TARGET)
        yield running


@pytest.fixture
def api(stack: Stack) -> Iterator[OpenBalenaApi]:
    with running_api(OpenBalenaApi(stack.registry.host)) as running:
        yield running


def test_a_release_with_forty_sources_is_ready_before_the_first_device_asks(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    for number in range(SOURCES):
        release = api.release(application, {"web": (source(number), None)}, finalized=old)
        api.devices(release, 1 + number % 3)
    with serving(stack, api, tmp_path, api_poll="3600") as server:
        until("the API was asked", lambda: fleet(server)["polled"])
        assert fleet(server)["releases"] == []
        refused, _ = call(server, "/api/v1/fleet/poll", body=b"{}")
        assert refused == 401
        finalized = datetime.now(UTC)
        digest = str(stack.pair.target.digest)
        api.release(application, {"web": (TARGET, digest)}, version="2.0.0", finalized=finalized)
        webhook = b'{"action": "published", "release": {"id": 7}}'
        status, _ = call(server, "/api/v1/fleet/poll", f"ci:{PASSWORD}", webhook)
        assert status == 202
        until(
            "all are ready",
            lambda: [one["state"] for one in fleet(server)["releases"]] == ["done"],
            seconds=300,
        )
        (release_,) = fleet(server)["releases"]
        assert release_["deltas"] == {"ready": SOURCES}
        assert (release_["bases"], release_["devices"]) == (
            SOURCES,
            sum(1 + n % 3 for n in range(40)),
        )
        print(f"finalized to all ready: {release_['ended'] - finalized.timestamp():.1f} s")
        # None of them is built when its first device requests it.
        for number in range(0, SOURCES, 7):
            update = stack.update(server, tmp_path / f"device-{number}", source(number), TARGET)
            assert update.is_delta
        _, listed = call(server, "/api/v1/deltas/list?limit=1")
        assert listed["deltas"][0]["names"]["dest"]["text"] == "acme/web 2.0.0 (c0ffee)"


def test_a_budget_ends_a_release_and_frequent_sources_come_first(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    for number in range(4):
        release = api.release(application, {"web": (source(number), None)}, finalized=old)
        api.devices(release, 1 + number)
    api.release(application, {"web": (TARGET, None)}, version="2.0.0")
    with serving(stack, api, tmp_path, prepare_bytes="1", max_builds="1") as server:
        until("it ends", lambda: [r["state"] for r in fleet(server)["releases"]] == ["done"])
        (release_,) = fleet(server)["releases"]
        assert release_["deltas"] == {"ready": 1, "skipped": 3}
        _, jobs = call(server, f"/api/v1/prepare/{release_['list']}")
        assert [(job["src"], job["state"]) for job in jobs["jobs"]][:1] == [(source(3), "ready")]
        assert jobs["jobs"][1]["reason"] == "the release's budget of bytes is used up"


def test_an_api_that_is_away_affects_nothing_else(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    api.tokens = set()
    with serving(stack, api, tmp_path, api_poll="1") as server:
        until("the API refuses", lambda: fleet(server)["problem"])
        with urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        assert lines[0] == "ready"
        assert any(line.startswith("fleet: openBalena's API: ") for line in lines)
        with urllib.request.urlopen(f"{server.operator_url}/", timeout=60) as answer:
            page = answer.read().decode()
        assert "New releases are not seen" in page and "api-token is wrong" in page
        assert stack.update(server, tmp_path / "device", source(1), TARGET).is_delta
        api.tokens = {TOKEN}
        until("the API answers", lambda: fleet(server)["problem"] is None)
        assert server.log.count("new releases are not seen") == 1


def test_without_api_url_there_is_no_fleet(stack: Stack, tmp_path: Path) -> None:
    with stack.server(str(tmp_path / "state")) as server:
        status, answer = call(server, "/api/v1/fleet")
        assert status == 404 and "set api-url" in answer["error"]["message"]
        with urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=60) as ready:
            assert b"fleet" not in ready.read()


def test_pruning_removes_what_no_device_can_ask_for_and_says_so_before(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    releases = [
        api.release(application, {"web": (source(number), None)}, finalized=old)
        for number in range(4)
    ]
    for release in releases:
        api.devices(release)
    latest = api.release(application, {"web": (TARGET, None)}, version="2.0.0")
    with serving(stack, api, tmp_path, keep_served="0", publish="registry") as server:
        until("it ends", lambda: [r["state"] for r in fleet(server)["releases"]] == ["done"])
        tags = {f"delta-{source(number)[3:19]}" for number in range(4)}
        until("all are pushed", lambda: in_registry(stack, TARGET) >= tags)
        until_unprotected()
        assert prune(server)["kept"] == {"can be asked for": 8}
        # One device updates; one release is deleted, with the images that devices had of it.
        device = next(row for row in api.tables["device"].values() if row["running"] == releases[0])
        device["running"] = latest
        for install in api.tables["image_install"].values():
            if install["device"] == device["id"]:
                install["status"] = "deleted"
        api.delete_release(releases[1])
        dry = prune(server)
        assert not dry["applied"] and dry["freed"] == 0
        gone = {(one["src"], one["reason"]) for one in dry["store"]}
        assert gone == {
            (source(0), "no device has its base, or is to have it"),
            (source(1), "the release of its base is gone"),
        }
        assert prune(server)["store"] == dry["store"]  # nothing was removed
        done = prune(server, "--apply")
        assert done["applied"] and done["store"] == dry["store"] and done["freed"] > 0
        # The tests' token service grants no deletion, as openBalena's does.
        assert "does not let builder (the credentials of obdelta) delete from" in done["problem"]
        assert prune(server)["store"] == []
        assert stack.update(server, tmp_path / "device", source(2), TARGET).is_delta
        # A device that still requests a removed one gets it again.
        assert stack.update(server, tmp_path / "late", source(0), TARGET).is_delta
        grants = stack.registry.tokens
        assert grants is not None
        grants.builder_actions.add("delete")
        try:
            until("it is not pushed any more", lambda: in_registry(stack, TARGET) >= tags)
            done = prune(server, "--apply")
            assert done["problem"] is None
            assert {tag for one in done["registry"] for tag in one["tags"]} >= {
                f"delta-{source(number)[3:19]}" for number in (0, 1)
            }
            left = in_registry(stack, TARGET)
            assert not left & {f"delta-{source(number)[3:19]}" for number in (0, 1)}
            assert left >= {f"delta-{source(number)[3:19]}" for number in (2, 3)}
        finally:
            grants.builder_actions.remove("delete")


def test_a_manifest_that_another_tag_needs_stays_in_the_registry(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    """The same image in two releases: deltas from both are one manifest with two tags."""
    twin = f"v2/77{source(6)[5:]}"
    other = f"v2/88{source(6)[5:]}"
    image = make_image([*stack.pair.base.layers], tmp_path / "twin")
    for repository in (twin, other):
        push_image(stack, image, repository)
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    both = [
        api.release(application, {"web": (repository, None)}, finalized=old)
        for repository in (twin, other)
    ]
    for release in both:
        api.devices(release)
    api.release(application, {"web": (TARGET, None)}, version="2.0.0")
    tags = {f"delta-{repository[3:19]}" for repository in (twin, other)}
    grants = stack.registry.tokens
    assert grants is not None
    grants.builder_actions.add("delete")
    try:
        # One form: while the other one has one tag of the two, nothing else needs its manifest.
        with serving(
            stack, api, tmp_path, keep_served="0", publish="registry", delta_compression="gzip"
        ) as server:
            until("it ends", lambda: [r["state"] for r in fleet(server)["releases"]] == ["done"])
            until("both are pushed", lambda: in_registry(stack, TARGET) >= tags)
            until_unprotected()
            leave(api, both[0])
            done = prune(server, "--apply")
            assert (done["store"], done["registry"], done["problem"]) == ([], [], None)
            assert in_registry(stack, TARGET) >= tags
            leave(api, both[1])
            done = prune(server, "--apply")
            assert {tag for one in done["registry"] for tag in one["tags"]} >= tags
            assert not in_registry(stack, TARGET) & tags
            assert done["store"] and done["freed"] > 0
    finally:
        grants.builder_actions.remove("delete")


def test_a_token_that_sees_nothing_prunes_nothing(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    api.devices(api.release(application, {"web": (source(5), None)}, finalized=old))
    api.release(application, {"web": (TARGET, None)}, version="2.0.0")
    with serving(stack, api, tmp_path, keep_served="0") as server:
        until("it ends", lambda: [r["state"] for r in fleet(server)["releases"]] == ["done"])
        tables, api.tables = api.tables, {name: {} for name in api.tables}
        done = prune(server, "--apply")
        assert done["store"] == [] and done["kept"] == {"not known to the API": 2}
        api.tables, api.tokens = tables, set()
        refused = run_prune(server, "--apply")
        assert refused.returncode == 1 and "api-token is wrong" in refused.stderr


def test_pruning_removes_v2_batches_when_the_release_of_their_target_is_gone(
    stack: Stack, api: OpenBalenaApi, tmp_path: Path
) -> None:
    application = api.application("acme")
    old = datetime.now(UTC) - timedelta(days=30)
    first = api.release(application, {"web": (source(3), None)}, finalized=old)
    api.devices(first)
    last = api.release(application, {"web": (TARGET, None)}, version="2.0.0")
    with serving(stack, api, tmp_path, keep_served="0", publish="registry") as server:
        until("it ends", lambda: [r["state"] for r in fleet(server)["releases"]] == ["done"])
        assert stack.ask(server, version=2, base=source(3), target=TARGET)[0] == 300

        def batches() -> set[str]:
            return {tag for tag in in_registry(stack, TARGET) if tag.startswith("delta2-")}

        (tag,) = until("it is pushed", batches)
        grants = stack.registry.tokens
        assert grants is not None
        grants.builder_actions.add("delete")
        try:
            api.delete_release(first)
            prune(server, "--apply")
            assert batches() == {tag}, "another image may have the same base"
            api.delete_release(last)
            done = prune(server, "--apply")
            assert done["problem"] is None
            assert tag in {each for one in done["registry"] for each in one["tags"]}
            assert batches() == set()
        finally:
            grants.builder_actions.remove("delete")
