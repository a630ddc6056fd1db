"""The registry API ``/v2/``: serves deltas from the store and streams everything else from the
upstream.

Source: OCI distribution specification (pull), and the requests of balena-engine
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from twisted.logger import Logger
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from obdelta.builds.delta_tags import DELTA_TAG, DeltaTags
from obdelta.builds.service import Answer, DeltaService, Published, Ready
from obdelta.builds.types import Pair
from obdelta.errors import BadDigest, BadRequest, Denied, ObdeltaError, Unauthorized, Unavailable
from obdelta.oci import Digest, Reference
from obdelta.oci.reference import is_repository, is_tag
from obdelta.registry import CredentialPolicy, ProxiedRequest, Upstream
from obdelta.store.named_deltas import NamedDelta
from obdelta.web.bodies import send_relayed
from obdelta.web.devices.admission import Admission
from obdelta.web.devices.auth import Grant
from obdelta.web.devices.pull_through import PullThrough
from obdelta.web.devices.rebuilt_layers import RebuiltLayers
from obdelta.web.devices.stored_content import StoredContent

log = Logger()

_PATH = re.compile(
    r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)", re.ASCII
)
_FROM_BASE = re.compile(r"delta-(?P<base>[0-9a-f]{32})", re.ASCII)
_HOLD_MANIFEST = 15 * 60.0
"""Seconds that a manifest request is held while its delta is built. Engines wait far longer, and
fail at once on an error.
"""
_RELAYED = (b"accept", b"range", b"if-range", b"if-none-match", b"if-modified-since", b"user-agent")


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed path under ``/v2/``. ``kind`` is ``manifests``, ``blobs``, ``tags`` or
    ``referrers``.
    """

    repository: str
    kind: str
    reference: str

    @property
    def path(self) -> str:
        """Returns the path for the upstream."""
        return f"/v2/{self.repository}/{self.kind}/{self.reference}"


_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+/-]{1,255}", re.ASCII)
_LAST = re.compile(r"[ -~]{0,255}", re.ASCII)
_PARAMETERS: Mapping[str, Mapping[bytes, re.Pattern[str]]] = {
    "tags": {b"n": _NUMBER, b"last": _LAST},
    "referrers": {b"artifactType": _MEDIA_TYPE},
}
"""The query parameters of each endpoint, and their valid values. Others never reach the
upstream.
"""


def relayed_query(kind: str, given: Mapping[bytes, Sequence[bytes]]) -> bytes:
    """Returns the query for the upstream: the endpoint's own parameters, in a fixed order. Raises
    BadRequest for invalid values.

    Other parameters would make identical requests look different.
    """
    found: list[tuple[bytes, bytes]] = []
    for name, pattern in _PARAMETERS.get(kind, {}).items():
        values = given.get(name, ())
        if not values:
            continue
        if len(values) > 1 or pattern.fullmatch(values[0].decode("latin-1")) is None:
            raise BadRequest(f"the parameter {name.decode()} cannot be used")
        found.append((name, values[0]))
    return urlencode(found).encode("ascii")


def parse_path(path: str) -> Target | None:
    """Returns the path's parts, or None for ``/v2/`` itself. Raises BadRequest for any
    other path.
    """
    if path in ("/v2", "/v2/"):
        return None
    if path == "/v2/_catalog":
        raise BadRequest("the catalog of all repositories is not served: ask the registry itself")
    match = _PATH.fullmatch(path)
    if match is None:
        raise BadRequest("there is nothing at this path")
    name, kind, reference = match["name"], match["kind"], match["reference"]
    if not is_repository(name):
        raise BadRequest("bad repository name")
    if kind in ("blobs", "referrers"):
        Digest.parse(reference)
    elif kind == "manifests" and not is_tag(reference):
        try:
            Digest.parse(reference)
        except BadDigest as error:
            raise BadRequest("neither a tag nor a digest") from error
    elif kind == "tags" and reference != "list":
        raise BadRequest("there is nothing at this path")
    return Target(name, kind, reference)


class Distribution:
    """Serves GET and HEAD under ``/v2/``."""

    def __init__(
        self,
        *,
        upstream: Upstream,
        coordinator: DeltaService,
        finished: StoredContent,
        admission: Admission,
        policy: CredentialPolicy,
        relay_ping: bool,
        pull_through: PullThrough | None = None,
        again: RebuiltLayers | None = None,
        tags: DeltaTags,
        named: Callable[[str, Pair], Awaitable[None]],
    ) -> None:
        """``pull_through`` serves upstream blobs; None relays them only. ``again`` serves evicted
        layers. ``named`` records the pair that a tag stands for.
        """
        self._rebuilt_layers, self._tags, self._named = again, tags, named
        self._relay_ping, self._pull_through = relay_ping, pull_through
        self._upstream, self._coordinator, self._finished = upstream, coordinator, finished
        self._admission, self._policy = admission, policy

    async def serve(self, request: Request, path: str) -> None:
        """Answers one request completely. Raises errors only before the first byte of the
        response.
        """
        requested = parse_path(path)
        header = request.getHeader(b"authorization")
        if requested is None:
            self._admission.admit(request, [])
            await self._ping(request, header)
            return
        if requested.kind == "blobs":
            grant = await self._admission.admit_blob(
                request, requested.repository, Digest.parse(requested.reference)
            )
        else:
            grant = self._admission.admit(request, [requested.repository])
        target = replace(requested, repository=grant.repository(requested.repository))
        client = self._admission.limited_client(request, grant)
        if target.kind == "manifests" and await self._serve_manifest(
            request, target, header, client, grant
        ):
            return
        if target.kind == "blobs" and await self._finished.blob(
            request, target.repository, Digest.parse(target.reference)
        ):
            return
        if target.kind == "blobs" and await self._rebuilt(request, target, header, client):
            return
        if target.kind == "blobs" and await self._pulled_through(request, target, header):
            return
        await self._relay(request, target.path, target, header)

    async def _rebuilt(
        self, request: Request, target: Target, header: bytes | None, client: str
    ) -> bool:
        if self._rebuilt_layers is None:
            return False
        return await self._rebuilt_layers.serve(
            request,
            target.repository,
            Digest.parse(target.reference),
            self._policy.credentials(header),
            client,
            lambda base: self._admission.also(request, [target.repository, base]),
        )

    async def _pulled_through(self, request: Request, target: Target, header: bytes | None) -> bool:
        if self._pull_through is None:
            return False
        digest, credentials = Digest.parse(target.reference), self._policy.credentials(header)
        return await self._pull_through.serve(request, target.repository, digest, credentials)

    async def _ping(self, request: Request, header: bytes | None) -> None:
        # Where the upstream decides on the device's token, the engine needs the upstream's own
        # challenge: it never sends the token otherwise. Elsewhere no upstream is needed here.
        if self._relay_ping:
            await self._relay(request, "/v2/", None, header)
            return
        send_ping(request)

    async def _serve_manifest(
        self, request: Request, target: Target, header: bytes | None, client: str, grant: Grant
    ) -> bool:
        if await self._finished.manifest(request, target.repository, target.reference):
            return True
        wanted = _FROM_BASE.fullmatch(target.reference)
        if wanted is not None:
            base = Reference("", f"v2/{wanted['base']}")
            self._admission.also(request, [target.repository, base.repository])
            await self._build(
                request, target, base, Reference("", target.repository), header, client
            )
            return True
        if DELTA_TAG.fullmatch(target.reference) is None:
            return False
        await self._rebuild(request, target, header, client, grant)
        return True

    async def _rebuild(
        self, request: Request, target: Target, header: bytes | None, client: str, grant: Grant
    ) -> None:
        """Serves a delta's tag whose delta is not in the store.

        The tag was given to a client, so it is never answered with 404. The delta is built again,
        or the target's own manifest is served.
        """
        own = Reference("", target.repository)
        named = await self._tags.named(target.repository, target.reference)
        if named:
            one = self._allowed(request, named)
        elif await self._relay(request, target.path, target, header, unless=404):
            return  # the registry has it: other servers push deltas too
        else:
            bases = [name for name in grant.actions or () if grant.allows(name)]
            found = await self._tags.rediscovered(
                target.repository, target.reference, bases, self._policy.credentials(header)
            )
            if found is None or not self._may(request, found):
                log.info(
                    "the delta {tag} in {repository} is not known: the image's own manifest is"
                    " served",
                    tag=target.reference,
                    repository=target.repository,
                )
                await self._relay(request, _own_path(target, own), target, header)
                return
            one = found
        base = Reference("", one.base_repository, digest=one.base)
        await self._build(request, target, base, replace(own, digest=one.target), header, client)

    def _allowed(self, request: Request, named: Sequence[NamedDelta]) -> NamedDelta:
        """Returns the first delta whose base the token grants. Raises Denied."""
        for one in named[:-1]:
            if self._may(request, one):
                return one
        self._admission.also(request, [named[-1].target_repository, named[-1].base_repository])
        return named[-1]

    def _may(self, request: Request, named: NamedDelta) -> bool:
        try:
            self._admission.also(request, [named.target_repository, named.base_repository])
        except Denied:
            return False
        return True

    async def _build(
        self,
        request: Request,
        target: Target,
        base: Reference,
        own: Reference,
        header: bytes | None,
        client: str,
    ) -> None:
        """Serves the delta between two images under a delta's tag, and builds it while the request
        is held.

        If there is no delta, serves the manifest of ``own``, the target. The device then still gets
        the right image.
        """
        try:
            answer: Answer | None = await self._coordinator.delta(
                "v3", base, own, self._policy.credentials(header), _HOLD_MANIFEST, client
            )
        except (Unauthorized, Denied):
            raise
        except ObdeltaError as error:
            log.info(
                "the delta {tag} cannot be built now: {reason}",
                tag=target.reference,
                reason=str(error),
            )
            answer = None
        if isinstance(answer, Published | Ready):
            await self._record(target, answer)
        if isinstance(answer, Published):
            published = replace(target, reference=str(answer.name.tag))
            if await self._relay(request, published.path, target, header, unless=404):
                return
        elif isinstance(answer, Ready) and await self._finished.built_manifest(
            request, target.repository, answer.delta.content
        ):
            return
        await self._relay(request, _own_path(target, own), target, header)

    async def _record(self, target: Target, answer: Ready | Published) -> None:
        try:
            await self._named(target.reference, answer.pair)
        except Unavailable as error:
            log.warn(
                "the name {tag} was not recorded: {reason}", tag=target.reference, reason=str(error)
            )

    async def _relay(
        self,
        request: Request,
        path: str,
        target: Target | None,
        header: bytes | None,
        *,
        unless: int | None = None,
    ) -> bool:
        """Sends the upstream's response. Returns False, with nothing sent, if its status is
        ``unless``.
        """
        headers = Headers()
        for name in _RELAYED:
            for value in request.requestHeaders.getRawHeaders(name, []):
                headers.addRawHeader(name, value)
        response = await self._upstream.relay(
            ProxiedRequest(
                request.method,
                path,
                headers,
                self._policy.credentials(header),
                target.repository if target is not None else None,
                b"" if target is None else relayed_query(target.kind, request.args),
                _digest_in(path),
            )
        )
        if response.status == unless:
            response.cancel()
            return False
        await send_relayed(request, response)
        return True


def _own_path(target: Target, own: Reference) -> str:
    return replace(target, reference=own.selector).path


def _digest_in(path: str) -> Digest | None:
    """Returns the digest in the path of a manifest or blob, or None for a tag or any other path."""
    try:
        target = parse_path(path)
        return (
            Digest.parse(target.reference)
            if target is not None and target.kind in ("manifests", "blobs")
            else None
        )
    except BadDigest:
        return None


def send_ping(request: Request) -> None:
    """Confirms to an admitted client that this is a registry."""
    request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
    request.setHeader(b"content-type", b"application/json")
    request.setHeader(b"content-length", b"2")
    request.write(b"{}")
    request.finish()
