"""Jobs of real ``obdelta worker`` processes: the bytes that two workers publish for one pair, and
an operator who cancels a build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obdelta.device.http import Http
from obdelta.oci import Form
from tests.server.test_actions import act, listed
from tests.server.test_workers import is_running, operators
from tests.support.images import TARGET_REPOSITORY, make_pair
from tests.support.images import Pair as Images
from tests.support.processes import until
from tests.support.redis import RunningRedis, running_redis
from tests.support.shared_servers import NAME, Start
from tests.support.stack import Stack, running_stack
from tests.support.workers import outcomes

MANIFEST_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json,"
    "application/vnd.oci.image.manifest.v1+json"
)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack whose build takes long enough to be cancelled."""
    with running_stack(tmp_path / "stack", make_pair(tmp_path / "pair", size=64 << 20)) as running:
        yield running


def from_registry(stack: Stack, path: str) -> bytes | None:
    """A list of tags or a manifest; None for a tag that is listed while it is still written."""
    headers = {"Authorization": f"Bearer {stack.token()}", "Accept": MANIFEST_TYPES}
    url = f"{stack.registry.url}/v2/{TARGET_REPOSITORY}/{path}"
    with Http(timeout=60).request("GET", url, headers) as answer:
        assert answer.status in (200, 404), path
        return b"".join(answer.chunks()) if answer.status == 200 else None


def published(stack: Stack) -> dict[str, str]:
    """The digest of each delta's manifest in the registry, by its tag."""
    tags = json.loads(from_registry(stack, "tags/list") or b"")["tags"]
    return {
        tag: hashlib.sha256(manifest).hexdigest()
        for tag in tags
        if tag.startswith("delta")
        and (manifest := from_registry(stack, f"manifests/{tag}")) is not None
    }


def published_by_one_worker(
    directory: Path, images: Images, form: Form, max_builds: str
) -> dict[str, str]:
    """Has a worker of its own build both forms, the one that a device asks for first, and a v2
    batch. The worker has a state-dir, a registry, a Redis and a frontend that no other worker
    knows.
    """
    with (
        running_stack(directory / "stack", images) as stack,
        running_redis(directory / "redis") as queue,
    ):
        settings: dict[str, Any] = {
            "environment": {"OBDELTA_SHARED": queue.url},
            "public_url": NAME,
            "builds": "workers",
            "publish": "registry",
        }
        with (
            stack.server("frontend", **settings) as frontend,
            stack.server("worker", worker=True, max_builds=max_builds, **settings) as worker,
        ):
            assert stack.update(frontend, directory / "device", form=form).is_delta
            until("both forms are in the registry", lambda: len(published(stack)) == 2)
            assert outcomes(worker) == ["ready", "ready"]
            assert f"form={form.value} outcome=ready" in worker.log.split("build: pair=")[1]
            assert stack.ask(frontend, version=2)[0] == 300
            assert outcomes(worker) == ["ready", "ready", "ready"]
            return published(stack)


def test_two_workers_publish_the_same_bytes(tmp_path: Path) -> None:
    images = make_pair(tmp_path / "pair", size=1 << 20)
    one = published_by_one_worker(tmp_path / "one", images, Form.GZIP, max_builds="1")
    other = published_by_one_worker(tmp_path / "other", images, Form.ZSTD, max_builds="4")
    assert {tag.endswith("-zstd") for tag in one} == {True, False}
    assert [tag for tag in one if tag.startswith("delta2-")] and len(one) == 3
    assert one == other


def test_an_operator_cancels_what_a_worker_builds(
    stack: Stack,
    start: Start,
    redis: RunningRedis,
) -> None:
    frontend, other = start("frontend"), start("other")
    worker = start("worker", worker=True, max_builds="1")
    with ThreadPoolExecutor(2) as pool:
        device = pool.submit(stack.ask, frontend)
        until(
            "the worker builds", lambda: "builds_running 1.0" in operators(worker, "/metrics"), 60
        )
        until("its frontend knows", lambda: listed(frontend, state="building"))
        joined = pool.submit(stack.ask, other)
        until("a device of the other frontend waits, too", lambda: listed(other, state="building"))
        (build,) = listed(frontend, state="building")
        status, ended = act(frontend, "cancel", build["id"])
        assert (status, ended["state"]) == (200, "failed")
        assert ended["reason"] == "an operator cancelled the build"
        # The devices pull in full, also the one of the other frontend.
        for waiting in (device, joined):
            status, _, body = waiting.result(60)
            assert (status, json.loads(body)) == (200, {"name": stack.names()[1]})
        (ended,) = listed(other)
        assert ended["reason"] == "an operator cancelled the build"
    until("the worker has ended the build", lambda: bool(outcomes(worker)))
    assert outcomes(worker) == ["skipped"]
    assert "reason=an operator cancelled the build" in worker.log
    assert not is_running(redis) and published(stack) == {}
    tmp = worker.state_dir / "tmp"
    until("its temporary files are gone", lambda: not list(tmp.iterdir()))
    # The worker is free, and builds the pair when an operator wants it.
    assert act(frontend, "retry", build["id"])[0] == 200
    until("it is built", lambda: bool(published(stack)), 120)
    assert "Traceback" not in frontend.log + other.log + worker.log
