"""An upstream of OCI layouts in a directory, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.web.http_headers import Headers

from obdelta.oci import Digest
from obdelta.registry import Credentials, LayoutUpstream, ProxiedRequest, ProxiedResponse
from tests.support.clients import Consumer, running_threads
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair

ANONYMOUS = Credentials.anonymous()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "root")


@pytest.fixture
def upstream(pair: Pair) -> Iterator[LayoutUpstream]:
    with running_threads() as threads:
        yield LayoutUpstream(pair.root, threads)


def blob_path(pair: Pair, digest: Digest, repository: str = TARGET_REPOSITORY) -> Path:
    return pair.root / repository / "blobs" / "sha256" / digest.hex


async def relayed(
    upstream: LayoutUpstream, path: str, method: bytes = b"GET", **headers: str
) -> tuple[ProxiedResponse, bytes]:
    named = Headers(
        {name.replace("_", "-").encode(): [value.encode()] for name, value in headers.items()}
    )
    answer = await upstream.relay(ProxiedRequest(method, path, named, ANONYMOUS))
    consumer = Consumer()
    await answer.deliver(consumer)
    assert consumer.producer is None
    return answer, bytes(consumer.content)
