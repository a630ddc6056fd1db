"""The devices' HTTP endpoint: routes, error responses, request IDs and one log line a request."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from obdelta.concurrency.limits import Limit
from obdelta.errors import BadRequest, ObdeltaError, Unauthorized
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.net.http_server import BoundedSite, HttpBounds, phrase_of
from obdelta.observability.request_id import HEADER, accepted, make, within
from obdelta.store import files
from obdelta.web.bodies import abort
from obdelta.web.devices.registry_api import Distribution
from obdelta.web.devices.v2 import DOWNLOAD_PATH, Batches
from obdelta.web.devices.v3 import DeltaApi, refuse_crowded
from obdelta.web.errors import api_status_of, asks_again, registry_body, retry_after, status_of
from obdelta.web.held_answers import HeldAnswers
from obdelta.web.requests_in_flight import InFlight

log = Logger()

METHODS = (b"GET", b"HEAD", b"OPTIONS")
"""The methods of the devices' endpoint. Nothing is pushed through this server."""
ALLOW = b", ".join(METHODS)
DELTA_PATHS = frozenset(("/api/v2/delta", "/api/v3/delta"))
"""The paths that supervisors poll."""


@implementer(IResource)
class Answering(ABC):
    """A leaf resource that answers with a coroutine and maps its errors to HTTP."""

    isLeaf = True

    def __init__(self, held: HeldAnswers, client: Callable[[Request], str]) -> None:
        """``held``: what holds answers of the delta API that mean "ask again". ``client`` returns
        whom a request counts for there.
        """
        self.in_flight, self.held, self._client = InFlight(), held, client

    @abstractmethod
    async def serve(self, request: Request, path: str) -> None:
        """Answers a GET or HEAD. Raises before anything is sent, or causes the connection to be
        cut.
        """

    def getChildWithDefault(self, name: bytes, request: Request) -> IResource:
        """Required by IResource; never called, as this is a leaf."""
        return self

    def putChild(self, path: bytes, child: IResource) -> None:
        """Required by IResource; raises TypeError, as a leaf has no children."""
        raise TypeError("the face has no children")

    def render(self, request: Request) -> int:
        """Starts an answer, which is cancelled if the client disconnects."""
        self.in_flight.add(request)
        answer = ensureDeferred(self._serve(request))
        left = request.notifyFinish()
        left.addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, request)
        return NOT_DONE_YET

    async def _serve(self, request: Request) -> None:
        if request.method == b"OPTIONS":
            request.setHeader(b"allow", ALLOW)
            send(request, 200, b"text/plain", b"")
            return
        try:
            path = unquote_to_bytes(request.path).decode("ascii")
        except UnicodeDecodeError as error:
            raise BadRequest("the path is not ASCII") from error
        registry = path == "/v2" or path.startswith("/v2/")
        if request.method not in METHODS:
            request.setHeader(b"allow", ALLOW)
            why = f"only {ALLOW.decode()} are served here"
            errors = {"errors": [{"code": "UNSUPPORTED", "message": why, "detail": None}]}
            body = json.dumps(errors) if registry else why
            send(
                request,
                405,
                b"application/json" if registry else b"text/plain",
                body.encode() + b"\n",
            )
        elif path in DELTA_PATHS:
            await self._serve_delta(request, path)
        else:
            await self.serve(request, path)

    async def _serve_delta(self, request: Request, path: str) -> None:
        self.held.begin(request)
        try:
            await self.serve(request, path)
        except ObdeltaError as error:
            if asks_again(error) and not request.startedWriting:
                await self.held.wait(request, self._client(request))
            raise

    def _failed(self, failure: Failure, request: Request) -> None:
        if failure.check(CancelledError) or getattr(request, "_disconnected", False):
            return
        if request.startedWriting or request.finished:
            if failure.check(ObdeltaError):
                why = failure.getErrorMessage()
                log.warn(
                    "the answer to {path} broke off: {why}",
                    path=ascii(request.path),
                    why=why,
                    request=name_of(request),
                )
            else:
                log.failure(
                    "the answer to {path} broke off",
                    failure,
                    path=ascii(request.path),
                    request=name_of(request),
                )
            abort(request)
            return
        error = failure.value
        if isinstance(error, OSError):
            log.warn(
                "the store gave an error at {path}: {reason}",
                path=ascii(request.path),
                reason=files.described(error),
                request=name_of(request),
            )
            error = files.translated(error)
        if not isinstance(error, ObdeltaError):
            log.failure(
                "unexpected error at {path}",
                failure,
                path=ascii(request.path),
                request=name_of(request),
            )
            message = with_name("an unexpected error; the log has it", request)
            send(request, 500, b"text/plain", message.encode("ascii"))
            return
        for name in (b"content-length", b"etag", b"docker-content-digest", b"accept-ranges"):
            request.responseHeaders.removeHeader(name)
        if isinstance(error, Unauthorized) and error.challenge is not None:
            request.setHeader(b"www-authenticate", error.challenge.encode("latin-1"))
        if (seconds := retry_after(error)) is not None:
            request.setHeader(b"retry-after", str(seconds).encode("ascii"))
        if request.path.startswith(b"/v2"):
            request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
            send(
                request,
                status_of(error),
                b"application/json",
                registry_body(error, name_of(request)),
            )
        else:
            status = api_status_of(error) if request.path.startswith(b"/api/") else status_of(error)
            send(
                request,
                status,
                b"text/plain",
                with_name(str(error), request).encode("utf-8", "replace"),
            )


class DeviceApp(Answering):
    """Serves everything that devices can reach."""

    def __init__(
        self,
        api: DeltaApi,
        batches: Batches,
        distribution: Distribution,
        held: HeldAnswers,
        client: Callable[[Request], str],
    ) -> None:
        super().__init__(held, client)
        self._api, self._batches, self._distribution = api, batches, distribution

    async def serve(self, request: Request, path: str) -> None:
        if path == "/v2" or path.startswith("/v2/"):
            await self._distribution.serve(request, path)
        elif path == "/api/v3/delta":
            # Text, as open-balena-delta sends it; supervisors parse the body whatever its type.
            send(request, 200, b"application/json", await self._api.answer_v3(request))
        elif path == "/api/v2/delta":
            request.setHeader(b"location", (await self._batches.locate(request)).encode("ascii"))
            # As open-balena-delta answers; supervisors take any 3xx.
            send(request, 300, b"text/plain", b"see Location\n")
        elif path == DOWNLOAD_PATH:
            refuse_crowded(request)
            await self._batches.download(request)
        elif path == "/healthz":
            send(request, 200, b"text/plain", b"ok\n")
        else:
            send(request, 404, b"text/plain", b"there is nothing at this path\n")


def name_of(request: object) -> str:
    """Returns the ID of a request, or "" if it has none."""
    return request.name if isinstance(request, NamedRequest) else ""


def with_name(message: str, request: object) -> str:
    """Returns a line for an error's body that ends with the request ID, for a search in the log."""
    name = name_of(request)
    return f"{message} (request {name})\n" if name else f"{message}\n"


def send(request: Request, status: int, content_type: bytes, body: bytes) -> None:
    """Sends a small, complete response and ends the request."""
    request.setResponseCode(status, phrase_of(status))
    request.setHeader(b"content-type", content_type)
    request.setHeader(b"content-length", str(len(body)).encode("ascii"))
    request.write(body)
    request.finish()


class NamedRequest(Request):
    """A request with an ID, which goes with everything done for it: log lines, builds, workers,
    upstream requests.

    A trusted proxy may set the ID (``X-Request-Id``). The response carries it in the same header.
    """

    name = ""
    crowded = False
    """Whether the connection is above the limit of its address. The application must then refuse
    the request.
    """

    def process(self) -> None:
        """Sets the ID, then processes the request in its context."""
        given = accepted(self.getHeader(HEADER)) if self.may_be_named() else None
        self.name = given or make()
        self.responseHeaders.setRawHeaders(HEADER, [self.name.encode("ascii")])
        within(self.name, super().process)

    def may_be_named(self) -> bool:
        """Returns whether the sender is trusted to set the request ID."""
        return True


class TimedRequest(NamedRequest):
    """A request that records its arrival time and logs one line when it ends."""

    came: float = 0.0
    whole = False
    route: str | None = None
    """The pattern that the path matched, if a table of routes served it."""
    clock: IReactorTime
    clients: ForwardedClients
    ended: Callable[[TimedRequest], None] | None

    def process(self) -> None:
        self.came, self.whole = self.clock.seconds(), True
        super().process()

    def may_be_named(self) -> bool:
        """Returns True only for a proxy: a device could make another's log lines look
        like its own.
        """
        return self.clients.comes_from_proxy(self)

    def finish(self) -> None:
        super().finish()  # type: ignore[no-untyped-call] # Twisted's
        self._log_line("done")

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)  # type: ignore[no-untyped-call] # Twisted's
        if self.whole:
            self._log_line("cut")

    def _log_line(self, how: str) -> None:
        # The path without its query, which may hold a signature.
        log.info(
            "request: peer={peer} method={method} path={path} status={status} bytes={bytes}"
            " seconds={seconds} end={how}",
            peer=self.clients.address(self) or "-",
            method=self.method.decode("latin-1"),
            path=ascii(self.path.decode("latin-1"))[1:-1][:300],
            status=self.code,
            bytes=self.sentLength,
            seconds=round(self.clock.seconds() - self.came, 3),
            how=how,
            request=self.name,
        )
        if self.ended is not None:
            self.ended(self)


def make_site(
    face: IResource,
    reactor: Any,
    *,
    clients: ForwardedClients,
    connections: Limit | None = None,
    exempt: TrustedProxies | None = None,
    ended: Callable[[TimedRequest], None] | None = None,
    bounds: HttpBounds | None = None,
) -> BoundedSite:
    """Returns the factory for one endpoint. Its requests log themselves, so Twisted's access log
    (whole URLs) is off.

    ``ended`` is called once with every request when it has ended.
    """

    class LoggingRequest(TimedRequest):
        pass

    LoggingRequest.clock, LoggingRequest.clients = reactor, clients
    LoggingRequest.ended = staticmethod(ended) if ended is not None else None
    return QuietSite(
        face,
        requestFactory=LoggingRequest,
        reactor=reactor,
        bounds=bounds,
        connections=connections,
        exempt=exempt,
        takes_crowded=_is_api,
    )


def _is_api(path: bytes) -> bool:
    """Returns whether a request must not be answered with 429, which would make a supervisor pull
    in full.
    """
    return path.startswith(b"/api/")


class QuietSite(BoundedSite):
    """A site without Twisted's access log, which writes whole URLs."""

    def log(self, request: object) -> None:
        """Writes nothing: TimedRequest logs its own line."""
