"""The registry face, ``/v2/``: what obdelta made is served from its store, everything else streams from the upstream.

Source: OCI distribution specification (pull), and what balena-engine asks (``docs/wire-protocol.md``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from twisted.web.http import Request
from twisted.web.http_headers import Headers

from obdelta.builds.coordinator import Coordinator, Published, Ready
from obdelta.errors import BadDigest, BadRequest, ManifestUnknown
from obdelta.oci import Digest, Reference
from obdelta.oci.reference import is_repository, is_tag
from obdelta.registry import CredentialPolicy, RelayRequest, Upstream
from obdelta.web.admission import Admission
from obdelta.web.again import MadeAgain
from obdelta.web.bodies import send_relayed
from obdelta.web.finished import Finished
from obdelta.web.pull_through import PullThrough

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)", re.ASCII)
_FROM_BASE = re.compile(r"delta-(?P<base>[0-9a-f]{32})", re.ASCII)
_HOLD_MANIFEST = 15 * 60.0
"""Seconds that a manifest request is held while its delta is built; engines wait far longer, and fail at once on an error."""
_RELAYED = (b"accept", b"range", b"if-range", b"if-none-match", b"if-modified-since", b"user-agent")


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed path under ``/v2/``; ``kind`` is ``manifests``, ``blobs``, ``tags`` or ``referrers``."""

    repository: str
    kind: str
    reference: str

    @property
    def path(self) -> str:
        """As the upstream is asked."""
        return f"/v2/{self.repository}/{self.kind}/{self.reference}"


def parse_path(path: str) -> Target | None:
    """The path's parts, None for ``/v2/`` itself. Raises BadRequest for what no registry serves."""
    if path in ("/v2", "/v2/"):
        return None
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
        coordinator: Coordinator,
        finished: Finished,
        admission: Admission,
        policy: CredentialPolicy,
        relay_ping: bool,
        pull_through: PullThrough | None = None,
        again: MadeAgain | None = None,
    ) -> None:
        """``pull_through``: how the upstream's blobs are served; None: they are only relayed. ``again``: how layers are that
        were given up."""
        self._again = again
        self._relay_ping, self._pull_through = relay_ping, pull_through
        self._upstream, self._coordinator, self._finished = upstream, coordinator, finished
        self._admission, self._policy = admission, policy

    async def serve(self, request: Request, path: str) -> None:
        """Answer one request, wholly. Errors that are raised were met before the first byte of the answer."""
        asked = parse_path(path)
        header = request.getHeader(b"authorization")
        if asked is None:
            self._admission.admit(request, [])
            await self._ping(request, header)
            return
        if asked.kind == "blobs":
            grant = await self._admission.admit_blob(request, asked.repository, Digest.parse(asked.reference))
        else:
            grant = self._admission.admit(request, [asked.repository])
        target = replace(asked, repository=grant.repository(asked.repository))
        asker = self._admission.asker(request, grant)
        if target.kind == "manifests" and await self._serve_manifest(request, target, header, asker):
            return
        if target.kind == "blobs" and await self._finished.blob(
            request, target.repository, Digest.parse(target.reference)
        ):
            return
        if target.kind == "blobs" and await self._made_again(request, target, header, asker):
            return
        if target.kind == "blobs" and await self._pulled_through(request, target, header):
            return
        await self._relay(request, target.path, target, header)

    async def _made_again(self, request: Request, target: Target, header: bytes | None, asker: str) -> bool:
        if self._again is None:
            return False
        return await self._again.serve(
            request,
            target.repository,
            Digest.parse(target.reference),
            self._policy.credentials(header),
            asker,
            lambda base: self._admission.also(request, [target.repository, base]),
        )

    async def _pulled_through(self, request: Request, target: Target, header: bytes | None) -> bool:
        if self._pull_through is None:
            return False
        digest, credentials = Digest.parse(target.reference), self._policy.credentials(header)
        return await self._pull_through.serve(request, target.repository, digest, credentials)

    async def _ping(self, request: Request, header: bytes | None) -> None:
        # Where the upstream decides on the device's token, its own challenge must reach the engine, else that never
        # sends the token; elsewhere no upstream is needed to say that we are a registry.
        if self._relay_ping:
            await self._relay(request, "/v2/", None, header)
            return
        send_ping(request)

    async def _serve_manifest(self, request: Request, target: Target, header: bytes | None, asker: str) -> bool:
        if await self._finished.manifest(request, target.repository, target.reference):
            return True
        wanted = _FROM_BASE.fullmatch(target.reference)
        return wanted is not None and await self._build(request, target, f"v2/{wanted['base']}", header, asker)

    async def _build(self, request: Request, target: Target, base: str, header: bytes | None, asker: str) -> bool:
        """A delta tag that names the base's repository: built while the manifest request is held."""
        self._admission.also(request, [target.repository, base])
        answer = await self._coordinator.delta(
            "v3",
            Reference("", base),
            Reference("", target.repository),
            self._policy.credentials(header),
            _HOLD_MANIFEST,
            asker,
        )
        if isinstance(answer, Published):
            await self._relay(request, replace(target, reference=str(answer.name.tag)).path, target, header)
            return True
        if not isinstance(answer, Ready):
            # The target's own manifest under the delta's tag: the device ends with the right image all the same.
            await self._relay(request, replace(target, reference="latest").path, target, header)
            return True
        if not await self._finished.built_manifest(request, target.repository, answer.delta.content):
            raise ManifestUnknown(target.repository, target.reference)
        return True

    async def _relay(self, request: Request, path: str, target: Target | None, header: bytes | None) -> None:
        headers = Headers()
        for name in _RELAYED:
            for value in request.requestHeaders.getRawHeaders(name, []):
                headers.addRawHeader(name, value)
        response = await self._upstream.relay(
            RelayRequest(
                request.method,
                path,
                headers,
                self._policy.credentials(header),
                target.repository if target is not None else None,
                request.uri.partition(b"?")[2],
            )
        )
        await send_relayed(request, response)


def send_ping(request: Request) -> None:
    """That this is a registry, to whom has been let in."""
    request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
    request.setHeader(b"content-type", b"application/json")
    request.setHeader(b"content-length", b"2")
    request.write(b"{}")
    request.finish()
