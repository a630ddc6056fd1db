"""A blob of an upstream that misbehaves (tests/support/hostile.py)."""

from __future__ import annotations

import hashlib

from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials
from tests.support.clients import Memory, client_of
from tests.support.hostile import (
    Answer,
    hostile_upstream,
)

ANONYMOUS = Credentials.anonymous()
REPOSITORY = "v2/app"
BODY = hashlib.shake_128(b"blob").digest(700_000)
BLOB = Descriptor("application/octet-stream", Digest.of(BODY), len(BODY))
BLOB_PATH = f"/v2/{REPOSITORY}/blobs/{BLOB.digest}"


async def fetch(
    *answers: Answer, path: str = BLOB_PATH, idle: float = 20.0
) -> tuple[bytes, list[str | None]]:
    """Returns the blob, and the Range header of each request for it."""
    async with hostile_upstream() as upstream, client_of(upstream.url, idle=idle) as client:
        upstream.script(path, *answers)
        sink = Memory()
        await client.blob(REPOSITORY, BLOB, ANONYMOUS, sink)
        return bytes(sink.content), [seen.header("range") for seen in upstream.seen]
