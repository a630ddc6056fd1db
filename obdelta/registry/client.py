"""Client for any upstream that speaks the OCI distribution specification over HTTP: manifests,
blobs, proxied requests.

Source: OCI distribution specification 1.1, "Pull"; Docker Registry HTTP API V2.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    Missing,
    SettingsError,
    UpstreamUnavailable,
)
from obdelta.observability import Metrics
from obdelta.oci import (
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    parse_config,
    parse_manifest,
)
from obdelta.oci.manifest import ACCEPT, MAX_CONFIG, MAX_MANIFEST
from obdelta.registry.addresses import AddressRules
from obdelta.registry.auth.credentials import Credentials, Disclosure
from obdelta.registry.download import Download, announced_size, blob_size, get_may_succeed
from obdelta.registry.http.redirects import split_url
from obdelta.registry.http.tls import Trust, make_agent, read_bundle
from obdelta.registry.http.transport import Http, HttpResponse
from obdelta.registry.http.transport_errors import WrongContent
from obdelta.registry.manifest_removal import Remover
from obdelta.registry.proxied_response import (
    VerifiedDelivery,
    relay_headers,
    relayed,
    relayed_bytes,
)
from obdelta.registry.requests import Backoff, Retrier, Session, error_of
from obdelta.registry.upload import Pusher
from obdelta.registry.upstream import ProxiedRequest, ProxiedResponse, Sink

_MANIFEST_HEADERS = Headers({b"accept": [media_type.encode("ascii") for media_type in ACCEPT]})
_REFUSED = frozenset((400, 401, 403, 405, 501))
"""Statuses by which object storage refuses a request that the registry redirected."""
_PROXY_BACKOFF = Backoff(attempts=3, first=0.2, time_limit=20.0)
"""A device waits for a proxied request and retries by itself, so only fast failures are retried
here.
"""


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
        proxy_backoff: Backoff = _PROXY_BACKOFF,
        disclosure: Disclosure = Disclosure(),  # noqa: B008 - a frozen value
    ) -> None:
        self._session = Session(base_url, http, clock, backoff, disclosure)
        self._clock, self._threads, self._proxy_backoff = clock, threads, proxy_backoff

    @classmethod
    def connect(
        cls,
        reactor: IReactor,
        base_url: str,
        threads: Threads,
        *,
        ca: Path | None = None,
        idle: float = 60.0,
        metrics: Metrics | None = None,
        realms: Collection[str] = (),
        basic: bool = False,
        redirects: Sequence[str] = (),
    ) -> RegistryClient:
        """Returns a client with an agent of its own. ``ca``: a PEM bundle that signs the upstream;
        None: the system's authorities.

        ``realms``: hosts of token servers, besides the upstream's own, that may see this server's
        password. ``basic``: whether the upstream may. ``redirects``: hosts, addresses and networks
        on loopback, link-local and private addresses that the upstream may use; see
        :class:`obdelta.registry.addresses.AddressRules`.
        """
        try:
            host = split_url(base_url).hostname or ""
        except ValueError as error:
            raise SettingsError(
                "upstream", base_url, "a URL like https://registry.example.com"
            ) from error
        trust = Trust(host, None if ca is None else read_bundle(ca))
        own = [
            one.rpartition(":")[0] if one.rpartition(":")[2].isdigit() else one for one in realms
        ]
        agent, pool = make_agent(reactor, trust, rules=AddressRules(host, own, redirects))
        disclosure = Disclosure(frozenset(one.lower() for one in (host, *realms)), basic)
        http = Http(agent, reactor, idle=idle, pool=pool, metrics=metrics)
        return cls(base_url, http, reactor, threads, disclosure=disclosure)

    def pusher(self) -> Pusher:
        """Returns a pusher to this registry that uses the same connections and tokens."""
        return Pusher(self._session, self._threads)

    def remover(self) -> Remover:
        """Returns a remover for this registry that uses the same connections and tokens."""
        return Remover(self._session)

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        """See :meth:`obdelta.registry.upstream.Upstream.manifest`."""
        return await self._session.retrier().call(
            lambda: self._manifest(repository, selector, credentials)
        )

    async def _manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
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
        claimed = response.header(b"docker-content-digest") or ""
        expected = (
            selector
            if selector.startswith("sha256:")
            else claimed
            if claimed.startswith("sha256:")
            else None
        )
        if expected is not None and str(digest) != expected:
            raise WrongContent(
                f"{response.host} sent a {what} that has digest {digest}, not {expected[:80]!a}"
            )
        if not raw.strip() or (expected is None and _is_cut_short(raw)):
            raise WrongContent(f"{response.host} sent an empty or incomplete {what}")
        return await self._threads.run(parse_manifest, raw, content_type, what)

    async def small_blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int
    ) -> bytes:
        """See :meth:`obdelta.registry.upstream.Upstream.small_blob`."""
        if descriptor.size > limit:
            raise ManifestInvalid(
                f"blob {descriptor.digest}", f"its {descriptor.size} bytes are over {limit}"
            )
        retrier = self._session.retrier()
        while True:
            sink = _Memory()
            try:
                await self._download(repository, descriptor, credentials, sink, retrier)
            except WrongContent as error:
                await retrier.wait(error)
            else:
                return bytes(sink.content)

    async def config(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> ImageConfig:
        """See :meth:`obdelta.registry.upstream.Upstream.config`."""
        raw = await self.small_blob(repository, descriptor, credentials, MAX_CONFIG)
        return await self._threads.run(parse_config, raw, f"config of {repository}")

    async def blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink
    ) -> None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob`."""
        await self._download(repository, descriptor, credentials, sink, self._session.retrier())

    async def _download(
        self,
        repository: str,
        descriptor: Descriptor,
        credentials: Credentials,
        sink: Sink,
        retrier: Retrier,
    ) -> None:
        async def fetch(headers: Headers) -> HttpResponse:
            return await self._get(
                f"/v2/{repository}/blobs/{descriptor.digest}",
                headers,
                credentials,
                repository,
                BlobUnknown(descriptor.digest),
                expected=(200, 206, 416),
            )

        await Download(descriptor, sink, fetch, self._threads.run).run(retrier)

    async def blob_size(
        self, repository: str, digest: Digest, credentials: Credentials, *, patient: bool = True
    ) -> int | None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob_size`."""
        retrier = self._session.retrier() if patient else Retrier(self._proxy_backoff, self._clock)
        return await blob_size(self._session, repository, digest, credentials, retrier)

    async def relay(self, request: ProxiedRequest) -> ProxiedResponse:
        """See :meth:`obdelta.registry.upstream.Upstream.relay`."""
        headers = relay_headers(request.headers)
        path = quote(request.path, safe="/:@!$&'()*+,;=~")
        if request.query:
            path += "?" + quote_from_bytes(request.query, safe="/:@!$&'()*+,;=~?%")
        blob = request.repository is not None and request.path.startswith(
            f"/v2/{request.repository}/blobs/"
        )

        async def send() -> HttpResponse:
            answer = await self._session.send(
                request.method, path, headers, request.credentials, request.repository
            )
            if blob and request.method == b"HEAD" and get_may_succeed(answer):
                await answer.response.discard()
                answer = await self._session.send(
                    b"GET", path, headers, request.credentials, request.repository
                )
                if (size := announced_size(answer.response)) is not None:
                    answer.response.headers.setRawHeaders(b"content-length", [b"%d" % size])
            if answer.foreign and answer.response.status in _REFUSED:
                # The registry admitted the client; the response of its storage is not meant for the
                # client.
                raise await error_of(answer, request.repository or "", BlobUnknown(request.path))
            return answer.response

        backoff = self._proxy_backoff
        if request.impatient:
            backoff = replace(backoff, attempts=min(2, backoff.attempts))
        response = await Retrier(backoff, self._clock).call(send)
        if request.method == b"GET" and response.status == 200:
            if request.digest is not None:
                return relayed(
                    request.method,
                    response,
                    VerifiedDelivery(response, request.digest, self._threads.run),
                )
            if response.length is None and "/manifests/" in request.path:
                return await self._manifest_of_unknown_length(response)
        return relayed(request.method, response)

    async def _manifest_of_unknown_length(self, response: HttpResponse) -> ProxiedResponse:
        """Reads a manifest requested by tag to its end and checks it. The end of the connection may
        end it.
        """
        content = await response.content(MAX_MANIFEST)
        if content is None:
            raise UpstreamUnavailable(
                f"{response.host} sent a manifest of more than {MAX_MANIFEST} bytes"
            )
        claimed = response.header(b"docker-content-digest") or ""
        if not claimed.startswith("sha256:"):
            whole = not _is_cut_short(content)
        else:
            whole = str(await self._threads.run(Digest.of, content)) == claimed
        if not whole:
            raise WrongContent(f"{response.host} sent an incomplete or wrong manifest")
        return relayed_bytes(response, content)

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
        """Returns a response with an expected status, its body unread; raises for every other
        status.
        """
        answer = await self._session.send(b"GET", path, headers, credentials, repository)
        if answer.response.status not in expected:
            raise await error_of(answer, repository, missing)
        return answer.response


def _is_cut_short(raw: bytes) -> bool:
    """Returns whether this is an incomplete JSON object, or empty: a response that ended too
    early.
    """
    start = raw.lstrip()
    return not start or (start.startswith(b"{") and not raw.rstrip().endswith(b"}"))


class _Memory:
    """A sink for a blob of a bounded size."""

    def __init__(self) -> None:
        self.content = bytearray()

    async def write(self, chunk: bytes) -> None:
        """Appends the bytes."""
        self.content += chunk
