"""v2 batches of replicas: two real servers, one redis-server, one docker-registry with tokens. The
registry is the batches' home, so a device may ask and download anywhere.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from obdelta.builds.publish.batch_publisher import ARTIFACT_TYPE, batch_manifest, batch_tag
from obdelta.builds.rsync_v2 import V2_RECIPE
from obdelta.device.http import Http
from obdelta.oci import Digest, parse_manifest
from obdelta.oci.manifest import ACCEPT
from obdelta.rootfs.compare import differences
from obdelta.rootfs.delay import TOKENS
from obdelta.rsync.proof import copy_for_proof
from obdelta.store.catalogue.records import DeltaKey, DeltaRow
from tests.server.test_v2 import get, trees
from tests.support.images import TARGET_REPOSITORY, make_pair
from tests.support.redis import RunningRedis, running_redis
from tests.support.server import RunningServer
from tests.support.shared_servers import NAME, Start
from tests.support.stack import Stack, running_stack

OLD, DELAYED = "Supervisor/14.9.4 (Linux)", "Supervisor/17.0.0 (Linux)"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(tmp_path / "stack", make_pair(tmp_path / "pair", size=1 << 20)) as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RunningRedis]:
    with running_redis(tmp_path / "redis") as running:
        yield running


@pytest.fixture
def shared_url(redis: RunningRedis) -> str:
    return redis.url


def located(stack: Stack, server: RunningServer, user_agent: str = OLD) -> str:
    """Path and query of the batch, as a server names it."""
    source, wanted = stack.names()
    query = f"src={source}&dest={wanted}&wait=true"
    authorization = f"Bearer {stack.token()}"
    status, headers, body = get(
        f"{server.url}/api/v2/delta?{query}", User_Agent=user_agent, Authorization=authorization
    )
    assert 300 <= status < 400, body
    url = headers["location"]
    assert url.startswith(NAME) and "full-pull" not in url, server.log[-3000:]
    return url.removeprefix(NAME)


def made(path: str) -> str:
    """The start of the digest that a URL promises."""
    return parse_qs(urlsplit(path).query)["made"][0]


def builds(*servers: RunningServer) -> int:
    return sum(server.log.count("outcome=ready") for server in servers)


def key_of(stack: Stack) -> DeltaKey:
    base, target = (
        parse_manifest(image.manifest, image.media_type).digest
        for image in (stack.pair.base, stack.pair.target)
    )
    return DeltaKey("v2", V2_RECIPE, base, target)


def artifact(stack: Stack, key: DeltaKey) -> dict[str, Any]:
    """The manifest of the batch, from the registry itself."""
    url = f"{stack.registry.url}/v2/{TARGET_REPOSITORY}/manifests/{batch_tag(key)}"
    headers = {
        "Authorization": f"Bearer {stack.token(TARGET_REPOSITORY)}",
        "Accept": ", ".join(ACCEPT),
    }
    with Http(timeout=30).request("GET", url, headers) as answer:
        assert answer.status == 200
        return dict(json.loads(answer.small(1 << 20)))


@pytest.mark.parametrize("publish", ["serve", "registry"])
def test_a_download_begun_at_one_replica_ends_at_the_other(
    stack: Stack, replica: Start, publish: str, tmp_path: Path
) -> None:
    one, other = replica("one", publish=publish), replica("other", publish=publish, processes="2")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda server: located(stack, server), (one, other, one, other)))
    assert len({made(path) for path in paths}) == 1 and builds(one, other) == 1
    (builder, reader) = (one, other) if builds(one) else (other, one)
    status, headers, whole = get(builder.url + paths[0])
    assert status == 200 and hashlib.sha256(whole).hexdigest().startswith(made(paths[0]))
    half, etag = len(whole) // 2, headers["etag"]
    first = get(builder.url + paths[0], Range=f"bytes=0-{half - 1}")
    rest = get(reader.url + paths[0], Range=f"bytes={half}-", If_Range=etag)
    assert (first[0], rest[0]) == (206, 206) and rest[1]["etag"] == etag
    assert first[2] + rest[2] == whole
    # Again: from its cache now. And to the end: rsync gets the target out of it.
    status, headers, again = get(reader.url + paths[1])
    assert (status, again, headers["etag"]) == (200, whole, etag)
    base, target = trees(stack.pair, tmp_path)
    copy_for_proof(base, target, tmp_path / "device")
    command = ["rsync", "--archive", "--delete", "--fake-super", "--read-batch=-"]
    subprocess.run(
        [*command, f"{tmp_path / 'device'}/"],
        input=again.partition(b"\0")[2],
        check=True,
        capture_output=True,
    )
    assert list(differences(tmp_path / "device", target)) == []
    found = artifact(stack, key_of(stack))
    assert found["artifactType"] == ARTIFACT_TYPE
    assert [layer["size"] for layer in found["layers"]] == [len(whole)]


def test_delayed_batches_are_the_same_everywhere(stack: Stack, replica: Start) -> None:
    """Also while the batch is fetched, and for ranges around what is inserted."""
    one = replica("one")
    path = located(stack, one, DELAYED)
    _, headers, whole = get(one.url + path)
    plain = get(one.url + located(stack, one))[2]
    inserted = len(whole) - len(plain)
    assert inserted > TOKENS, "each token takes some bytes"
    at = next(n for n in range(len(plain), 0, -1) if whole[:n] == plain[:n])
    ranges = [(at - 7, at + 9), (at + 5, at + inserted - 5), (at + inserted, len(whole))]
    for number, (start, stop) in enumerate(ranges):
        reader = replica(f"reader-{number}")
        status, found, part = get(
            reader.url + path, Range=f"bytes={start}-{stop - 1}", If_Range=headers["etag"]
        )
        assert (status, part) == (206, whole[start:stop])
        assert found["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
        assert get(reader.url + path)[2] == whole
        assert get(reader.url + path, method="HEAD")[1]["content-length"] == str(len(whole))
        assert builds(reader) == 0


def test_a_batch_outlives_its_builder_but_not_its_artifact(
    stack: Stack, replica: Start, redis: RunningRedis
) -> None:
    with stack.server("one", environment={"OBDELTA_SHARED": redis.url}, public_url=NAME) as one:
        path = located(stack, one)
        whole = get(one.url + path)[2]
    late = replica("late")
    assert get(late.url + path)[2] == whole
    assert made(located(stack, late)) == made(path) and builds(late) == 0
    # The registry loses it: what Redis still reports is not believed.
    tags = stack.root / "registry/data/docker/registry/v2/repositories" / TARGET_REPOSITORY
    (tags / f"_manifests/tags/{batch_tag(key_of(stack))}/current/link").unlink()
    last = replica("last")
    assert get(last.url + path)[0] == 404
    assert get(last.url + located(stack, last))[0] == 200 and builds(last) == 1


def test_the_first_batch_stays_and_no_url_leads_to_another(
    stack: Stack, replica: Start, redis: RunningRedis, tmp_path: Path
) -> None:
    """Two servers may build different bytes: their file systems list directories differently."""
    one = replica("one")
    path = located(stack, one)
    whole = get(one.url + path)[2]
    # Another server's, as if it had been pushed at the same time.
    key, foreign = key_of(stack), whole + b"\0"
    row = DeltaRow(
        key,
        base_repository="",
        target_repository=TARGET_REPOSITORY,
        tag=None,
        content=Digest.of(foreign),
        full_bytes=0,
        delta_bytes=len(foreign),
        seconds=0.0,
        created=0,
        details={"tail": 4, "sent_index": None},
    )
    push_artifact(stack, row, foreign)
    other = replica("other")
    assert get(other.url + path)[0] == 404, "never the other bytes"
    newer = located(stack, other)
    assert builds(other) == 0
    assert get(other.url + newer)[2] == foreign and get(one.url + newer)[2] == foreign
    # Its builder serves it as long as it has it.
    assert get(one.url + path)[2] == whole


def push_artifact(stack: Stack, row: DeltaRow, content: bytes) -> None:
    """Pushes a batch as a server does."""
    manifest = batch_manifest(row)
    authorization = stack.push_authorization(TARGET_REPOSITORY)
    for blob in (b"{}", content):
        start = f"{stack.registry.url}/v2/{TARGET_REPOSITORY}/blobs/uploads/"
        request = urllib.request.Request(
            start, method="POST", headers={"Authorization": authorization}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            where = answer.headers["Location"]
        url = f"{where}{'&' if '?' in where else '?'}digest={Digest.of(blob)}"
        request = urllib.request.Request(
            url,
            data=blob,
            method="PUT",
            headers={
                "Authorization": authorization,
                "Content-Type": "application/octet-stream",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 201
    request = urllib.request.Request(
        f"{stack.registry.url}/v2/{TARGET_REPOSITORY}/manifests/{batch_tag(row.key)}",
        data=manifest.raw,
        method="PUT",
        headers={"Authorization": authorization, "Content-Type": manifest.media_type},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 201
