"""The devices' endpoint in an additional server process: serves stored content, forwards everything
else to the first process.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.web.client import Agent, RequestTransmissionFailed, ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory
from twisted.web.server import Request
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import BadRequest, BlobUnknown, Cancelled
from obdelta.net.client_address import ForwardedClients
from obdelta.net.http_limits import HttpBounds
from obdelta.observability.logging import REQUEST_ID_HEADER, current_request
from obdelta.oci import Digest
from obdelta.oci.reference import parse_path
from obdelta.registry.http.transport import HttpResponse
from obdelta.registry.proxied_response import relayed
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.access.signed_urls import UrlSigner
from obdelta.web.devices.app import DeviceResource
from obdelta.web.devices.growing_batches import NO_CHUNKS
from obdelta.web.devices.legacy_batches import LegacyBatches
from obdelta.web.devices.registry_api import send_ping
from obdelta.web.devices.responses import Stored, send_proxied, send_stored
from obdelta.web.devices.retries import HeldAnswers
from obdelta.web.devices.stored_content import StoredContent
from obdelta.web.devices.v2 import DOWNLOAD_PATH
from obdelta.web.devices.v3 import CROWDED, refuse_crowded
from obdelta.web.request import respond
from obdelta.web.request_traces import RequestTraces

_DEVICE = HttpBounds()
BOUNDS = HttpBounds(
    line=_DEVICE.line + 1024,
    headers=_DEVICE.headers + 2048,
    header_count=_DEVICE.header_count + 3,
    idle=_DEVICE.idle,
)
"""Limits of the first process's private endpoint. It must not refuse requests that another server
process accepted, and to which that process added headers.
"""
_IDLE = 3600.0
"""Seconds without a byte after which a forwarded request is aborted. Longer than any request is
held, because the first process limits its waits itself.
"""
_NOT_FORWARDED = (
    b"connection",
    b"keep-alive",
    b"te",
    b"upgrade",
    b"transfer-encoding",
    b"content-length",
    b"expect",
    NO_CHUNKS,
    CROWDED,
)


@implementer(IAgentEndpointFactory)
class _FixedEndpoint:
    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def endpointForURI(self, uri: object) -> IStreamClientEndpoint:
        """Returns the same endpoint for every URI."""
        return self._endpoint


class Forwarder:
    """Forwards requests to the first process. Bodies stream, and a slow device slows the first
    process's side down.

    ``connect`` makes an endpoint for a client's address.
    """

    def __init__(
        self,
        connect: Callable[[str], IStreamClientEndpoint],
        clients: ForwardedClients,
        reactor: IReactor,
    ) -> None:
        self._connect, self._clients, self._reactor = connect, clients, reactor

    async def forward(self, request: Request) -> None:
        """Sends the first process's response to a GET or HEAD. Raises BadRequest, and Cancelled if
        the first process cannot be reached.
        """
        if not request.uri.startswith(b"/"):
            raise BadRequest("there is nothing at this path")
        headers = _forwarded(request)
        endpoint = self._connect(self._clients.address(request))
        agent = Agent.usingEndpointFactory(self._reactor, _FixedEndpoint(endpoint))
        url = b"http://coordinator" + request.uri
        try:
            pending = agent.request(request.method, url, headers)
        except ValueError as error:
            raise BadRequest("the URL holds what is not ASCII") from error
        try:
            answer = await pending
        except (ConnectError, ConnectionClosed, RequestTransmissionFailed, ResponseFailed) as error:
            raise Cancelled("the first process cannot be reached") from error
        await send_proxied(
            request,
            relayed(
                request.method, HttpResponse("http://coordinator", answer, self._reactor, _IDLE)
            ),
        )


def _forwarded(request: Request) -> Headers:
    headers = request.requestHeaders.copy()
    for name in _NOT_FORWARDED:
        headers.removeHeader(name)
    headers.setRawHeaders(REQUEST_ID_HEADER, [current_request().encode("ascii")])
    if request.clientproto != b"HTTP/1.1":
        headers.setRawHeaders(NO_CHUNKS, [b"1"])
    if getattr(request, "crowded", False):
        headers.setRawHeaders(CROWDED, [b"1"])
    return headers


class ForwardingApp(DeviceResource):
    """Serves everything that devices can reach, in another process than the first one."""

    def __init__(
        self,
        *,
        stored: StoredContent,
        admission: Admission,
        signer: UrlSigner,
        forwarder: Forwarder,
        forward_ping: bool,
        held: HeldAnswers,
        traces: RequestTraces,
    ) -> None:
        """``forward_ping`` is true if the upstream decides on the answer to ``/v2/``."""
        super().__init__(held, admission, traces)
        self._forward_ping = forward_ping
        self._stored, self._signer, self._forwarder = stored, signer, forwarder

    async def serve(self, request: Request, path: str) -> None:
        """Serves stored content from here and forwards every other request."""
        if path == "/healthz":
            respond(request, 200, b"text/plain", b"ok\n")
            return
        try:
            if path == DOWNLOAD_PATH:
                refuse_crowded(request)
                served = await self._batch(request)
            else:
                served = path.startswith("/v2/") and await self._distribution(request, path)
        except BlobUnknown:
            # It may be rebuilt, or was removed a moment ago: the main process decides.
            served = False
            for name in (b"docker-content-digest", b"content-type", b"cache-control"):
                request.responseHeaders.removeHeader(name)
        if not served:
            self._admission.hand_over(request)
            await self._forwarder.forward(request)

    async def _distribution(self, request: Request, path: str) -> bool:
        target = parse_path(path)
        if target is None and not self._forward_ping:
            self._admission.admit(request, [])
            send_ping(request)
            return True
        if target is None or target.kind not in ("manifests", "blobs"):
            return False
        if target.kind == "manifests":
            grant = self._admission.admit(request, [target.repository])
            return await self._stored.manifest(
                request, grant.repository(target.repository), target.reference
            )
        digest = Digest.parse(target.reference)
        grant = await self._admission.admit_blob(request, target.repository, digest)
        repository = grant.repository(target.repository)
        client = self._admission.limited_client(request, grant)
        blob = await self._stored.blob(request, repository, digest, client)
        if not isinstance(blob, Stored):
            return False
        send_stored(request, blob)
        return True

    async def _batch(self, request: Request) -> bool:
        if b"full-pull" in request.args or LegacyBatches.matches(request.args):
            return False
        batch = await self._stored.batch(request, self._signer.check(request.args))
        if batch is None:
            return False
        await self._stored.send_batch(request, batch)
        return True
