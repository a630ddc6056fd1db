"""The registry API ``/v2/``: serves deltas from the store and streams everything else from the
upstream.

Source: OCI distribution specification (pull), and the requests of balena-engine
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from twisted.logger import Logger
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from obdelta.builds.inputs.delta_names import DeltaNames
from obdelta.builds.publish.delta_tags import DELTA_TAG, tag_in
from obdelta.builds.service import DeltaService
from obdelta.builds.types import Answer, Published, Ready
from obdelta.errors import Denied, ObdeltaError, Unauthorized
from obdelta.oci import Digest, Reference
from obdelta.oci.reference import RegistryPath, parse_path, proxied_query
from obdelta.registry import CredentialPolicy, Credentials, ProxiedRequest, Upstream
from obdelta.store.catalogue.tables.refreshed_rows import NamedDelta
from obdelta.web.delta_form import best_form, tags_for
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.access.token_verifier import Grant
from obdelta.web.devices.blob_sources import BlobRequest, BlobSources, Proxied
from obdelta.web.devices.responses import Growing, send, send_proxied
from obdelta.web.devices.stored_content import (
    StoredContent,
    vary_by_engine,
)

log = Logger()

_FROM_BASE = re.compile(r"delta-(?P<base>[0-9a-f]{32})", re.ASCII)
_HOLD_MANIFEST = 15 * 60.0
"""Seconds that a manifest request is held while its delta is built. Engines wait far longer, and
fail at once on an error.
"""
_PROXIED_HEADERS = (
    b"accept",
    b"range",
    b"if-range",
    b"if-none-match",
    b"if-modified-since",
    b"user-agent",
)


class RegistryApi:
    """Serves GET and HEAD under ``/v2/``."""

    def __init__(
        self,
        *,
        upstream: Upstream,
        service: DeltaService,
        stored: StoredContent,
        blobs: BlobSources,
        admission: Admission,
        policy: CredentialPolicy,
        tags: DeltaNames,
        proxy_ping: bool,
    ) -> None:
        """``proxy_ping``: whether the upstream answers ``/v2/``."""
        self._upstream, self._service, self._stored = upstream, service, stored
        self._blobs, self._admission, self._policy = blobs, admission, policy
        self._tags, self._proxy_ping = tags, proxy_ping

    async def serve(self, request: Request, path: str) -> None:
        """Answers one request completely. Raises errors only before the first byte of the
        response.
        """
        requested = parse_path(path)
        if requested is None:
            self._admission.admit(request, [])
            await self._ping(request)
        elif requested.kind == "blobs":
            await self._serve_blob(request, requested)
        else:
            grant = self._admission.admit(request, [requested.repository])
            granted = replace(requested, repository=grant.repository(requested.repository))
            credentials = self._credentials(request)
            if granted.kind != "manifests" or not await self._serve_manifest(
                request, granted, credentials, grant
            ):
                await self._proxy(request, granted, credentials)

    def _credentials(self, request: Request) -> Credentials:
        """Returns the credentials that an admitted request uses at the upstream."""
        return self._policy.credentials(request.getHeader(b"authorization"))

    async def _serve_blob(self, request: Request, requested: RegistryPath) -> None:
        digest = Digest.parse(requested.reference)
        grant = await self._admission.admit_blob(request, requested.repository, digest)
        granted = replace(requested, repository=grant.repository(requested.repository))
        credentials = self._credentials(request)
        client = self._admission.limited_client(request, grant)
        source = await self._blobs.find(
            BlobRequest(
                request,
                granted.repository,
                digest,
                credentials,
                client,
                lambda base: self._admission.require_pull(request, [granted.repository, base]),
            )
        )
        if not isinstance(source, Proxied):
            try:
                await send(request, source)
                return
            except ObdeltaError as error:
                sent = request.startedWriting or request.finished
                if sent or not (isinstance(source, Growing) and source.proxy_instead):
                    raise
                log.info("a fetch failed before its first byte: {reason}", reason=str(error))
        await self._proxy(request, granted, credentials)

    async def _ping(self, request: Request) -> None:
        # Where the upstream decides on the device's token, the engine needs the upstream's own
        # challenge: it never sends the token otherwise. Elsewhere no upstream is needed here.
        if self._proxy_ping:
            await self._proxy(request, None, self._credentials(request))
        else:
            send_ping(request)

    async def _serve_manifest(
        self, request: Request, path: RegistryPath, credentials: Credentials, grant: Grant
    ) -> bool:
        if await self._stored.manifest(request, path.repository, path.reference):
            return True
        client = self._admission.limited_client(request, grant)
        wanted = _FROM_BASE.fullmatch(path.reference)
        if wanted is not None:
            vary_by_engine(request)
            base = Reference("", f"v2/{wanted['base']}")
            self._admission.require_pull(request, [path.repository, base.repository])
            own = Reference("", path.repository)
            await self._build(request, path, (base, own), credentials, client)
            return True
        if DELTA_TAG.fullmatch(path.reference) is None:
            return False
        vary_by_engine(request)
        pair = await self._pair_behind(request, path, credentials, grant)
        if pair is not None:
            await self._build(request, path, pair, credentials, client)
        return True

    async def _pair_behind(
        self, request: Request, path: RegistryPath, credentials: Credentials, grant: Grant
    ) -> tuple[Reference, Reference] | None:
        """Returns base and target of a delta's tag whose delta is not in the store. Returns None if
        the request was answered.

        The tag was given to a client, so it is never answered with 404. The delta is built again,
        or the target's own manifest is served.
        """
        own = Reference("", path.repository)
        recorded = await self._tags.named(path.repository, tag_in(path.reference))
        if recorded:
            delta = self._allowed(request, recorded)
        elif await self._proxy_delta(request, path, credentials):
            return None  # the registry has it: other servers push deltas too
        else:
            bases = [name for name in grant.actions or () if grant.allows(name)]
            found = await self._tags.rediscovered(
                path.repository, tag_in(path.reference), bases, credentials
            )
            if found is None or not self._is_allowed(request, found):
                log.info(
                    "the delta {tag} in {repository} is not known: the image's own manifest is"
                    " served",
                    tag=path.reference,
                    repository=path.repository,
                )
                await self._proxy(request, _own_path(path, own), credentials)
                return None
            delta = found
        base = Reference("", delta.base_repository, digest=delta.base)
        return base, replace(own, digest=delta.target)

    async def _proxy_delta(
        self, request: Request, path: RegistryPath, credentials: Credentials
    ) -> bool:
        """Sends a delta's manifest from the registry, in the best form that it has and the client
        reads. Returns False, with nothing sent, if it has none.
        """
        for tag in tags_for(request, path.reference):
            if await self._proxy(request, replace(path, reference=tag), credentials, unless=404):
                return True
        return False

    def _allowed(self, request: Request, recorded: Sequence[NamedDelta]) -> NamedDelta:
        """Returns the first delta whose base the token grants. Raises Denied."""
        for one in recorded[:-1]:
            if self._is_allowed(request, one):
                return one
        last = recorded[-1]
        self._admission.require_pull(request, [last.target_repository, last.base_repository])
        return last

    def _is_allowed(self, request: Request, named: NamedDelta) -> bool:
        try:
            self._admission.require_pull(request, [named.target_repository, named.base_repository])
        except Denied:
            return False
        return True

    async def _build(
        self,
        request: Request,
        path: RegistryPath,
        pair: tuple[Reference, Reference],
        credentials: Credentials,
        client: str,
    ) -> None:
        """Serves the delta of a pair, base and target, under a delta's tag. Builds it while the
        request is held.

        If there is no delta, serves the target's manifest. The device then still gets the right
        image.
        """
        base, target = pair
        try:
            answer: Answer | None = await self._service.delta(
                "v3",
                base,
                target,
                credentials,
                _HOLD_MANIFEST,
                client,
                form=best_form(request, path.reference),
            )
        except (Unauthorized, Denied):
            raise
        except ObdeltaError as error:
            log.info(
                "the delta {tag} cannot be built now: {reason}",
                tag=path.reference,
                reason=str(error),
            )
            answer = None
        if isinstance(answer, Published | Ready):
            await self._tags.record(path.reference, answer.pair)
        if isinstance(answer, Published):
            published = replace(path, reference=str(answer.name.tag))
            if await self._proxy(request, published, credentials, unless=404):
                return
        elif isinstance(answer, Ready) and await self._stored.built_manifest(
            request, path.repository, answer.delta.content
        ):
            return
        await self._proxy(request, _own_path(path, target), credentials)

    async def _proxy(
        self,
        request: Request,
        path: RegistryPath | None,
        credentials: Credentials,
        *,
        unless: int | None = None,
    ) -> bool:
        """Sends the upstream's response for a path, None for ``/v2/``. Returns False, with nothing
        sent, if its status is ``unless``.
        """
        headers = Headers()
        for name in _PROXIED_HEADERS:
            for value in request.requestHeaders.getRawHeaders(name, []):
                headers.addRawHeader(name, value)
        proxied = ProxiedRequest(request.method, "/v2/", headers, credentials)
        if path is not None:
            proxied = ProxiedRequest(
                request.method,
                path.path,
                headers,
                credentials,
                path.repository,
                proxied_query(path.kind, request.args),
                path.digest,
            )
        response = await self._upstream.relay(proxied)
        if response.status == unless:
            response.cancel()
            return False
        await send_proxied(request, response)
        return True


def _own_path(path: RegistryPath, own: Reference) -> RegistryPath:
    return replace(path, reference=own.selector)


def send_ping(request: Request) -> None:
    """Confirms to an admitted client that this is a registry."""
    request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
    request.setHeader(b"content-type", b"application/json")
    request.setHeader(b"content-length", b"2")
    request.write(b"{}")
    request.finish()
