"""Routes of the devices' endpoint, and one log line a request."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface import implementer

from obdelta.errors import BadRequest, ObdeltaError, TooManyRequests, Unauthorized
from obdelta.web.bodies import abort
from obdelta.web.delta_api import DeltaApi
from obdelta.web.distribution import Distribution
from obdelta.web.status import registry_body, status_of

log = Logger()


@implementer(IResource)
class Face:
    """Everything that devices can reach."""

    isLeaf = True

    def __init__(self, api: DeltaApi, distribution: Distribution) -> None:
        self._api, self._distribution = api, distribution

    def getChildWithDefault(self, name: bytes, request: Request) -> IResource:
        """Never called: this is a leaf. Here because IResource asks for it."""
        return self

    def putChild(self, path: bytes, child: IResource) -> None:
        """IResource asks for it; nothing can be put below a leaf."""
        raise TypeError("the face has no children")

    def render(self, request: Request) -> int:
        """Start an answer; the client's leaving cancels it."""
        answer = ensureDeferred(self._serve(request))
        left = request.notifyFinish()
        left.addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, request)
        return NOT_DONE_YET

    async def _serve(self, request: Request) -> None:
        try:
            path = unquote_to_bytes(request.path).decode("ascii")
        except UnicodeDecodeError as error:
            raise BadRequest("the path is not ASCII") from error
        registry = path == "/v2" or path.startswith("/v2/")
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"allow", b"GET, HEAD")
            _send(request, 405, b"application/json" if registry else b"text/plain", b'{"errors":[{"code":"UNSUPPORTED",'
                  b'"message":"only GET and HEAD are served here","detail":null}]}\n' if registry
                  else b"only GET and HEAD are served here\n")  # fmt: skip
        elif registry:
            await self._distribution.serve(request, path)
        elif path == "/api/v3/delta":
            # Text, as open-balena-delta sends it; supervisors parse the body whatever its type.
            _send(request, 200, b"application/json", await self._api.answer_v3(request))
        elif path == "/healthz":
            _send(request, 200, b"text/plain", b"ok\n")
        else:
            _send(request, 404, b"text/plain", b"there is nothing at this path\n")

    def _failed(self, failure: Failure, request: Request) -> None:
        if failure.check(CancelledError) or getattr(request, "_disconnected", False):
            return
        if request.startedWriting or request.finished:
            log.failure("the answer to {path} broke off", failure, path=ascii(request.path))
            abort(request)
            return
        error = failure.value
        if not isinstance(error, ObdeltaError):
            log.failure("unexpected error at {path}", failure, path=ascii(request.path))
            _send(request, 500, b"text/plain", b"an unexpected error; the log has it\n")
            return
        for name in (b"content-length", b"etag", b"docker-content-digest", b"accept-ranges"):
            request.responseHeaders.removeHeader(name)
        if isinstance(error, Unauthorized) and error.challenge is not None:
            request.setHeader(b"www-authenticate", error.challenge.encode("latin-1"))
        if isinstance(error, TooManyRequests) and error.retry_after is not None:
            request.setHeader(b"retry-after", str(max(1, round(error.retry_after))).encode("ascii"))
        if request.path.startswith(b"/v2"):
            request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
            _send(request, status_of(error), b"application/json", registry_body(error))
        else:
            _send(request, status_of(error), b"text/plain", str(error).encode("utf-8", "replace") + b"\n")


def _send(request: Request, status: int, content_type: bytes, body: bytes) -> None:
    request.setResponseCode(status)
    request.setHeader(b"content-type", content_type)
    request.setHeader(b"content-length", str(len(body)).encode("ascii"))
    request.write(body)
    request.finish()


class TimedRequest(Request):
    """A request that knows when it came, and logs itself however it ends."""

    came: float = 0.0
    clock: IReactorTime

    def process(self) -> None:
        self.came = self.clock.seconds()
        super().process()

    def finish(self) -> None:
        super().finish()
        self._log_line("done")

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self._log_line("cut")

    def _log_line(self, how: str) -> None:
        # The path without its query: what a query holds may be a signature.
        log.info(
            "request: peer={peer} method={method} path={path} status={status} bytes={bytes} seconds={seconds:.3f} end={how}",
            peer=self.getClientAddress().host if hasattr(self.getClientAddress(), "host") else "-",
            method=self.method.decode("latin-1"),
            path=ascii(self.path.decode("latin-1"))[1:-1][:300],
            status=self.code,
            bytes=self.sentLength,
            seconds=self.clock.seconds() - self.came,
            how=how,
        )


def make_site(face: Face, clock: IReactorTime) -> Site:
    """The factory for the devices' endpoint."""

    class ClockedRequest(TimedRequest):
        pass

    ClockedRequest.clock = clock
    return QuietSite(face, requestFactory=ClockedRequest)


class QuietSite(Site):
    """Twisted's own access log writes whole URLs; ours is written by the request."""

    def log(self, request: object) -> None:
        """Nothing: see TimedRequest."""
