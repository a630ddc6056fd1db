"""The upstream over HTTP: any registry that speaks the OCI distribution specification.

Source: OCI distribution specification 1.1, "Pull"; Docker Registry HTTP API V2.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta.errors import BlobUnknown, DigestMismatch, ManifestInvalid, ManifestUnknown, Missing, SettingsError
from obdelta.metrics import Metrics
from obdelta.oci import Descriptor, Digest, Index, Manifest, parse_manifest
from obdelta.oci.manifest import ACCEPT, MAX_MANIFEST
from obdelta.registry.answers import error_of
from obdelta.registry.credentials import Credentials
from obdelta.registry.download import Download
from obdelta.registry.http import Http, HttpResponse
from obdelta.registry.push import Pusher
from obdelta.registry.redirects import split_url
from obdelta.registry.relay import relay_headers, relayed
from obdelta.registry.retry import Backoff, Tries
from obdelta.registry.session import Session
from obdelta.registry.threads import Threads
from obdelta.registry.tls import Trust, make_agent, read_bundle
from obdelta.registry.upstream import RelayRequest, RelayResponse, Sink

_MANIFEST_HEADERS = Headers({b"accept": [media_type.encode("ascii") for media_type in ACCEPT]})
_RELAY_BACKOFF = Backoff(attempts=3, first=0.2, patience=20.0)
"""A device waits for a relayed request, and tries again by itself: only what fails fast is tried again here."""


class RegistryClient:
    """An :class:`obdelta.registry.upstream.Upstream` at ``base_url`` (scheme and host, no path)."""

    def __init__(
        self,
        base_url: str,
        http: Http,
        clock: IReactorTime,
        threads: Threads,
        *,
        backoff: Backoff = Backoff(),  # noqa: B008 - a frozen value
        relay_backoff: Backoff = _RELAY_BACKOFF,
    ) -> None:
        self._session = Session(base_url, http, clock, backoff)
        self._clock, self._threads, self._relay_backoff = clock, threads, relay_backoff

    @classmethod
    def connect(
        cls,
        reactor: Any,
        base_url: str,
        threads: Threads,
        *,
        ca: Path | None = None,
        idle: float = 60.0,
        metrics: Metrics | None = None,
    ) -> RegistryClient:
        """With an agent of its own. ``ca``: a PEM bundle that signs the upstream; None: the system's authorities."""
        try:
            host = split_url(base_url).hostname or ""
        except ValueError as error:
            raise SettingsError("upstream", base_url, "a URL like https://registry.example.com") from error
        trust = Trust(host, None if ca is None else read_bundle(ca))
        agent, pool = make_agent(reactor, trust)
        return cls(base_url, Http(agent, reactor, idle=idle, pool=pool, metrics=metrics), reactor, threads)

    def pusher(self) -> Pusher:
        """To push to this registry, over the same connections and tokens."""
        return Pusher(self._session, self._threads)

    async def manifest(self, repository: str, selector: str, credentials: Credentials) -> Manifest | Index:
        """See :meth:`obdelta.registry.upstream.Upstream.manifest`."""
        return await self._session.tries().call(lambda: self._manifest(repository, selector, credentials))

    async def _manifest(self, repository: str, selector: str, credentials: Credentials) -> Manifest | Index:
        what = f"manifest {selector} of {repository}"
        response = await self._get(
            f"/v2/{repository}/manifests/{selector}",
            _MANIFEST_HEADERS,
            credentials,
            repository,
            ManifestUnknown(repository, selector),
        )
        raw = await response.content(MAX_MANIFEST)
        if raw is None:
            raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
        content_type = response.header(b"content-type") or ""
        digest = await self._threads.run(Digest.of, raw)
        if selector.startswith("sha256:") and str(digest) != selector:
            raise DigestMismatch(selector, digest, what)
        claimed = response.header(b"docker-content-digest") or ""
        if claimed.startswith("sha256:") and str(digest) != claimed:
            raise DigestMismatch(claimed[:80], digest, what)
        return await self._threads.run(parse_manifest, raw, content_type, what)

    async def small_blob(self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int) -> bytes:
        """See :meth:`obdelta.registry.upstream.Upstream.small_blob`."""
        if descriptor.size > limit:
            raise ManifestInvalid(f"blob {descriptor.digest}", f"its {descriptor.size} bytes are over {limit}")
        sink = _Memory()
        await self.blob(repository, descriptor, credentials, sink)
        return bytes(sink.content)

    async def blob(self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink) -> None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob`."""

        async def fetch(headers: Headers) -> HttpResponse:
            return await self._get(
                f"/v2/{repository}/blobs/{descriptor.digest}",
                headers,
                credentials,
                repository,
                BlobUnknown(descriptor.digest),
                expected=(200, 206, 416),
            )

        await Download(descriptor, sink, fetch, self._threads.run).run(self._session.tries())

    async def relay(self, request: RelayRequest) -> RelayResponse:
        """See :meth:`obdelta.registry.upstream.Upstream.relay`."""
        headers = relay_headers(request.headers)
        path = quote(request.path, safe="/:@!$&'()*+,;=~")
        if request.query:
            path += "?" + quote_from_bytes(request.query, safe="/:@!$&'()*+,;=~?%")
        answer = await Tries(self._relay_backoff, self._clock).call(
            lambda: self._session.send(request.method, path, headers, request.credentials, request.repository)
        )
        return relayed(request.method, answer.response)

    async def close(self) -> None:
        """See :meth:`obdelta.registry.upstream.Upstream.close`."""
        await self._session.close()

    async def _get(
        self,
        path: str,
        headers: Headers,
        credentials: Credentials,
        repository: str,
        missing: Missing,
        *,
        expected: Container[int] = (200,),
    ) -> HttpResponse:
        """A response with an expected status, its body unread; every other status is an error."""
        answer = await self._session.send(b"GET", path, headers, credentials, repository)
        if answer.response.status not in expected:
            raise await error_of(answer, repository, missing)
        return answer.response


class _Memory:
    """A sink for a blob of a bounded size."""

    def __init__(self) -> None:
        self.content = bytearray()

    async def write(self, chunk: bytes) -> None:
        """Keep it."""
        self.content += chunk
