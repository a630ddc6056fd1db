"""API of finished deltas: finds the delta between two images, with its size report, manifest and
blobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.web.server import Request

from obdelta.delta.reports.image_report import report
from obdelta.errors import BadRequest
from obdelta.oci import Digest, Reference
from obdelta.rsync.batch_report import batch_report
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Kind
from obdelta.web.bodies import send_file
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json


class FinishedDeltas:
    """Serves ``/api/v1/deltas`` and ``/api/v1/blobs/{digest}``."""

    def __init__(self, catalogue: Catalogue, blobs: BlobStore, now: Callable[[], float]) -> None:
        self._catalogue, self._blobs, self._now = catalogue, blobs, now

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/deltas", self.delta)
        routes.add("GET", "/api/v1/blobs/{digest}", self.blob)

    async def delta(self, call: Call) -> Answer:
        """Returns the finished delta from ``src`` to ``dest`` and its report, for v3 with its
        manifest.

        ``kind`` is ``v3`` (the default) or ``v2``. Images are named as devices name them. A name
        without a digest matches any image of its repository; the newest delta is returned.
        ``keep=yes`` records the delta as served, so that its blobs stay while they are fetched.
        """
        source, target = Reference.parse(call.needed("src")), Reference.parse(call.needed("dest"))
        if source.tag or target.tag:
            raise BadRequest(
                "name both images by digest, or by repository alone: where a tag points is not"
                " known here"
            )
        kind: Kind = "v2" if call.argument("kind") == "v2" else "v3"
        if call.argument("kind", kind) != kind:
            raise BadRequest("kind is v2 or v3")
        row = await self._catalogue.between(
            kind, source.repository, target.repository, source.digest, target.digest
        )
        if row is not None and call.argument("keep") == "yes":
            await self._catalogue.served(row.content, int(self._now()))
        if row is not None and kind == "v2":
            batch = batch_report(row.details, row.full_bytes, row.delta_bytes)
            return as_json(
                {
                    "delta": row_as_json(row),
                    "report": batch.as_json() if batch is not None else None,
                }
            )
        manifest = (
            await self._catalogue.manifest(target.repository, row.content)
            if row is not None
            else None
        )
        if row is None or manifest is None:
            raise NotFound(f"there is no finished {kind} delta from {source} to {target}")
        return as_json(
            {
                "delta": row_as_json(row),
                "report": report(row.details, row.full_bytes, row.delta_bytes).as_json(),
                "manifest": {
                    "media_type": manifest.media_type,
                    "raw": manifest.raw.decode("utf-8"),
                },
            }
        )

    async def blob(self, call: Call) -> Answer:
        """Sends a file of the store by its digest (ranges too)."""
        digest = Digest.parse(call.parameters["digest"])
        path, size = self._blobs.path(digest), self._blobs.size(digest)
        if path is None or size is None:
            raise NotFound(f"there is no blob {digest}")
        return _File(path, size, digest)


def row_as_json(row: DeltaRow) -> dict[str, Any]:
    """Returns a delta's row without its details."""
    return {
        "kind": row.key.kind,
        "recipe": row.key.recipe,
        "base": {"repository": row.base_repository, "digest": str(row.key.base)},
        "target": {"repository": row.target_repository, "digest": str(row.key.target)},
        "tag": row.tag,
        "content": str(row.content),
        "full_bytes": row.full_bytes,
        "delta_bytes": row.delta_bytes,
        "seconds": round(row.seconds, 3),
        "created": row.created,
        "last_served": row.last_served,
        "served": row.served,
    }


@dataclass(frozen=True, slots=True)
class _File:
    """A blob as a response; a slow reader pauses the reading."""

    path: Path
    size: int
    digest: Digest

    def send(self, request: Request) -> None:
        request.setHeader(b"content-type", b"application/octet-stream")
        try:
            send_file(request, self.path, self.size, f'"{self.digest}"')
        except FileNotFoundError as error:
            raise NotFound(f"there is no blob {self.digest}") from error
