"""Where a blob comes from while it is evicted and rebuilt. The store and the rebuilt layers are
doubles: the moment between two look-ups cannot be hit with real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from obdelta.errors import Unavailable
from obdelta.oci import Digest
from obdelta.registry import Credentials
from obdelta.web.devices.blob_sources import BlobRequest, BlobSources, Proxied
from obdelta.web.devices.responses import Stored
from obdelta.web.devices.stored_content import EvictedBlob

DIGEST = Digest("ab" * 32)
EVICTED = EvictedBlob("v2/one", DIGEST, 3)


class States:
    """The states of a blob in the store, one for each look-up; its rebuild is always over."""

    def __init__(self, states: Sequence[Stored | EvictedBlob | None]) -> None:
        self.states = list(states)

    async def blob(self, *_: object) -> Stored | EvictedBlob | None:
        return self.states.pop(0)

    async def find(self, *_: object) -> None:
        return None


def find(states: States) -> Deferred[Any]:
    sources = BlobSources(cast(Any, states), cast(Any, states), None)
    request = BlobRequest(
        cast(Any, None),
        "v2/one",
        DIGEST,
        Credentials.anonymous(),
        "client",
        lambda repository: None,
    )
    return Deferred.fromCoroutine(sources.find(request))


@pytest_twisted.ensureDeferred
async def test_a_layer_that_is_stored_again_is_found(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"abc")
    stored = Stored.open(path, 3, '"etag"', {})
    with stored.file:
        assert await find(States([EVICTED, stored])) is stored
        assert await find(States([EVICTED, EVICTED, stored])) is stored


@pytest_twisted.ensureDeferred
async def test_a_layer_that_comes_and_goes_is_an_error_to_retry() -> None:
    with pytest.raises(Unavailable, match="store-quota"):
        await find(States([EVICTED] * 3))


@pytest_twisted.ensureDeferred
async def test_a_blob_of_no_delta_is_the_upstreams() -> None:
    assert isinstance(await find(States([None])), Proxied)
