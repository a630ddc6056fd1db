"""API of finished deltas: finds the delta between two images, with its size report, manifest and
blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from twisted.web.server import Request

from obdelta.builds.inputs.image_lookup import ImageLookup, SeveralPlatforms
from obdelta.delta.reports.image_report import report
from obdelta.errors import BadRequest
from obdelta.oci import Digest, Form, ImageNames, Reference
from obdelta.registry import Credentials
from obdelta.rsync.batch_report import batch_report
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.listed_deltas import id_of_key
from obdelta.store.catalogue.records import DeltaRow, Kind
from obdelta.web.devices.responses import BINARY, Stored, send_stored
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json

RELEASES = 9
"""Deltas of earlier releases that a delta is compared with."""


class DeltasApi:
    """Serves ``/api/v1/deltas`` and ``/api/v1/blobs/{digest}``.

    ``credentials`` turns an ``X-Registry-Authorization`` header into upstream credentials.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: BlobStore,
        lookup: ImageLookup,
        credentials: Callable[[bytes | None], Credentials],
        now: Callable[[], float],
    ) -> None:
        self._catalogue, self._blobs, self._now = catalogue, blobs, now
        self._lookup, self._credentials = lookup, credentials

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/deltas", self.delta)
        routes.add("GET", "/api/v1/blobs/{digest}", self.blob)

    async def delta(self, call: Call) -> Answer:
        """Returns the finished delta from ``src`` to ``dest`` and its report, for v3 with its
        manifest.

        ``kind`` is ``v3`` (the default) or ``v2``. Images are named as devices name them. A tag
        stands for the image that it has in the upstream now. A name without tag and digest matches
        any image of its repository; the newest delta is returned.
        ``form`` is that of the delta; without it, the universal form comes first.
        ``keep=yes`` records the delta as served, so that its blobs stay while they are fetched.
        """
        source, target = Reference.parse(call.needed("src")), Reference.parse(call.needed("dest"))
        kind: Kind = "v2" if call.argument("kind") == "v2" else "v3"
        if call.argument("kind", kind) != kind:
            raise BadRequest("kind is v2 or v3")
        name = call.argument("form")
        form = Form.named(name)
        if name and form is None:
            raise BadRequest(f"form is {' or '.join(each.value for each in Form)}")
        credentials = self._credentials(call.request.getHeader(b"x-registry-authorization"))
        row = await self._catalogue.between(
            kind,
            source.repository,
            target.repository,
            await self._digest(source, credentials),
            await self._digest(target, credentials),
            form,
        )
        if row is not None and call.argument("keep") == "yes":
            await self._catalogue.counters.served(row.content, int(self._now()))
        rows = [] if row is None else [row]
        before = [] if row is None else await self._catalogue.releases_before(row, RELEASES)
        names = await self._catalogue.named_images.of(
            [digest for each in (*rows, *before) for digest in (each.key.base, each.key.target)]
        )
        if row is not None and kind == "v2":
            batch = batch_report(row.details, row.full_bytes, row.delta_bytes)
            return as_json(
                {
                    "delta": row_as_json(row, names),
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
                "delta": row_as_json(row, names),
                "report": report(row.details, row.full_bytes, row.delta_bytes).as_json(),
                "releases": [row_as_json(each, names) for each in (row, *before)],
                "manifest": {
                    "media_type": manifest.media_type,
                    "raw": manifest.raw.decode("utf-8"),
                },
            }
        )

    async def _digest(self, image: Reference, credentials: Credentials) -> Digest | None:
        """Returns the digest that a reference selects, None for any. Raises errors of the
        upstream.
        """
        if image.digest is not None or image.tag is None:
            return image.digest
        try:
            return (await self._lookup.resolve(image, credentials)).manifest.digest
        except SeveralPlatforms as error:
            raise BadRequest(f"{error}: name the image by its digest") from error

    async def blob(self, call: Call) -> Answer:
        """Sends a file of the store by its digest (ranges too)."""
        digest = Digest.parse(call.parameters["digest"])
        path, size = self._blobs.path(digest), self._blobs.size(digest)
        if path is None or size is None:
            if await self._catalogue.evictions.is_evicted(digest):
                raise NotFound(
                    f"the layer {digest} was evicted: it is rebuilt when a device requests it;"
                    " `obdelta export --server` requests it as a device does"
                )
            raise NotFound(f"there is no blob {digest}")
        return _File(path, size, digest)


NO_NAMES: Final[Mapping[Digest, ImageNames]] = MappingProxyType({})


def image_as_json(
    repository: str, digest: Digest, names: Mapping[Digest, ImageNames]
) -> dict[str, Any]:
    """Returns one image with its names, if it has any."""
    named = names.get(digest)
    shown = {"repository": repository, "digest": str(digest)}
    return shown | ({"names": named.as_json()} if named is not None else {})


def row_as_json(row: DeltaRow, names: Mapping[Digest, ImageNames] = NO_NAMES) -> dict[str, Any]:
    """Returns a delta's row without its details."""
    return {
        "id": id_of_key(row.key),
        "kind": row.key.kind,
        "recipe": row.key.recipe,
        "form": row.key.form.value,
        "base": image_as_json(row.base_repository, row.key.base, names),
        "target": image_as_json(row.target_repository, row.key.target, names),
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
        try:
            file = Stored.open(self.path, self.size, f'"{self.digest}"', BINARY)
        except FileNotFoundError as error:
            raise NotFound(f"there is no blob {self.digest}") from error
        send_stored(request, file)
