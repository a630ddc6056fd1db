"""The devices' HTTP endpoint: routes, error responses and request IDs."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from urllib.parse import unquote_to_bytes

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from obdelta.errors import BadRequest, ObdeltaError, Unauthorized
from obdelta.oci.reference import parse_path
from obdelta.store import files
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.registry_api import RegistryApi
from obdelta.web.devices.retries import HeldAnswers
from obdelta.web.devices.v2 import DOWNLOAD_PATH, Batches
from obdelta.web.devices.v3 import DeltaApi, refuse_crowded
from obdelta.web.errors import api_status_of, is_retryable, registry_body, retry_after, status_of
from obdelta.web.request import NO_ROUTE, InFlight, TimedRequest, abort, id_of, respond, with_id
from obdelta.web.request_traces import REFUSALS, RequestTrace, RequestTraces, bounded

log = Logger()

METHODS = (b"GET", b"HEAD", b"OPTIONS")
"""The methods of the devices' endpoint. Nothing is pushed through this server."""
ALLOW = b", ".join(METHODS)
DELTA_PATHS = frozenset(("/api/v2/delta", "/api/v3/delta"))
"""The paths that supervisors poll."""
_EXACT = DELTA_PATHS | {DOWNLOAD_PATH, "/healthz", "/v2/"}
_REGISTRY = re.compile(r"/v2/.+/(manifests|blobs|tags|referrers)/[^/]+", re.ASCII)
_REST = {"manifests": "{reference}", "blobs": "{digest}", "tags": "list", "referrers": "{digest}"}


@implementer(IResource)
class DeviceResource(ABC):
    """A leaf resource that answers with a coroutine and maps its errors to HTTP."""

    isLeaf = True

    def __init__(self, held: HeldAnswers, admission: Admission, traces: RequestTraces) -> None:
        """``held`` holds answers of the delta API that mean "ask again". ``admission`` names the
        client of a request. ``traces`` remembers requests.
        """
        self.in_flight, self.held, self._admission = InFlight(), held, admission
        self.traces = traces
        self._refusals: dict[Request, str] = {}

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
        raise TypeError("a leaf has no children")

    def render(self, request: Request) -> int:
        """Starts an answer, which is cancelled if the client disconnects."""
        self.in_flight.add(request)
        request.notifyFinish().addBoth(lambda _: self._ended(request))
        answer = ensureDeferred(self._serve(request))
        left = request.notifyFinish()
        left.addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, request)
        return NOT_DONE_YET

    async def _serve(self, request: Request) -> None:
        if request.method == b"OPTIONS":
            request.setHeader(b"allow", ALLOW)
            respond(request, 200, b"text/plain", b"")
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
            respond(
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
            if is_retryable(error) and not request.startedWriting:
                await self.held.wait(request, self._admission.counted_client(request))
            raise

    def _failed(self, failure: Failure, request: Request) -> None:
        if failure.check(CancelledError) or getattr(request, "_disconnected", False):
            return
        if request.startedWriting or request.finished:
            if failure.check(ObdeltaError):
                why = failure.getErrorMessage()
                log.warn(
                    "a response was cut: {path}: {why}",
                    path=ascii(request.path),
                    why=why,
                    request=id_of(request),
                )
            else:
                log.failure(
                    "a response was cut: {path}",
                    failure,
                    path=ascii(request.path),
                    request=id_of(request),
                )
            abort(request)
            return
        error = failure.value
        if isinstance(error, OSError):
            log.warn(
                "{path} was not answered: the store failed: {reason}",
                path=ascii(request.path),
                reason=files.error_for_log(error),
                request=id_of(request),
            )
            error = files.error_for_client(error)
        if not isinstance(error, ObdeltaError):
            log.failure(
                "unexpected error at {path}",
                failure,
                path=ascii(request.path),
                request=id_of(request),
            )
            message = with_id("an unexpected error: see the log", request)
            respond(request, 500, b"text/plain", message.encode("ascii"))
            return
        self._refusals[request] = str(error)
        for name in (b"content-length", b"etag", b"docker-content-digest", b"accept-ranges"):
            request.responseHeaders.removeHeader(name)
        if isinstance(error, Unauthorized) and error.challenge is not None:
            request.setHeader(b"www-authenticate", error.challenge.encode("latin-1"))
        if (seconds := retry_after(error)) is not None:
            request.setHeader(b"retry-after", str(seconds).encode("ascii"))
        if request.path.startswith(b"/v2"):
            request.setHeader(b"docker-distribution-api-version", b"registry/2.0")
            respond(
                request,
                status_of(error),
                b"application/json",
                registry_body(error, id_of(request)),
            )
        else:
            status = api_status_of(error) if request.path.startswith(b"/api/") else status_of(error)
            respond(
                request,
                status,
                b"text/plain",
                with_id(str(error), request).encode("utf-8", "replace"),
            )

    def unexplained(self, request: Request) -> str:
        """Returns why a request was refused that raised no error, "" if another process knows."""
        return ""

    def _ended(self, request: Request) -> None:
        """Logs why a request was refused, and remembers the request if it came from a device."""
        reason = self._refusals.pop(request, "")
        refused = request.code in REFUSALS
        if refused:
            reason = reason or self.unexplained(request)
        # The process that forwarded a request of another class remembers it.
        timed = request if isinstance(request, TimedRequest) else None
        if timed is None and not (refused and reason):
            return
        trace = RequestTrace(
            when=self.traces.now(),
            request=id_of(request),
            peer=self._admission.address(request),
            subject=bounded(self._admission.subject(request)),
            token=request.getHeader(b"authorization") is not None,
            method=request.method.decode("latin-1")[:16],
            path=bounded(request.path.decode("latin-1")),
            image=requested_image(request),
            status=request.code,
            bytes=request.sentLength,
            seconds=0.0 if timed is None else round(timed.clock.seconds() - timed.started, 3),
            end="" if timed is None else timed.end,
            reason=bounded(reason) if refused else "",
        )
        if trace.reason:
            self.traces.refused(trace)
        if timed is not None:
            self.traces.add(trace)


def requested_image(request: Request) -> str:
    """Returns what a request names, as bounded ASCII: a repository with tag or digest, or both
    images of a delta request; "" for none.
    """
    if request.path.decode("latin-1") in DELTA_PATHS:
        names = [
            bounded(b"".join(request.args.get(name, [])[:1]).decode("latin-1"))
            for name in (b"src", b"dest")
        ]
        return " -> ".join(names) if any(names) else ""
    try:
        found = parse_path(unquote_to_bytes(request.path).decode("ascii"))
    except (BadRequest, UnicodeDecodeError):
        return ""
    if found is None:
        return ""
    return bounded(f"{found.repository}{'@' if ':' in found.reference else ':'}{found.reference}")


class DeviceApp(DeviceResource):
    """Serves everything that devices can reach."""

    def __init__(
        self,
        api: DeltaApi,
        batches: Batches,
        registry: RegistryApi,
        held: HeldAnswers,
        admission: Admission,
        traces: RequestTraces,
    ) -> None:
        super().__init__(held, admission, traces)
        self._api, self._batches, self._registry = api, batches, registry

    def unexplained(self, request: Request) -> str:
        """Returns the reason of a refusal without an error of ours."""
        registry = request.path == b"/v2" or request.path.startswith(b"/v2/")
        if registry:
            return f"the upstream registry answered {request.code}"
        return "there is nothing at this path"

    async def serve(self, request: Request, path: str) -> None:
        if path == "/v2" or path.startswith("/v2/"):
            await self._registry.serve(request, path)
        elif path == "/api/v3/delta":
            # Text, as open-balena-delta sends it; supervisors parse the body whatever its type.
            respond(request, 200, b"application/json", await self._api.answer_v3(request))
        elif path == "/api/v2/delta":
            request.setHeader(b"location", (await self._batches.locate(request)).encode("ascii"))
            # As open-balena-delta answers; supervisors take any 3xx.
            respond(request, 300, b"text/plain", b"see Location\n")
        elif path == DOWNLOAD_PATH:
            refuse_crowded(request)
            await self._batches.download(request)
        elif path == "/healthz":
            respond(request, 200, b"text/plain", b"ok\n")
        else:
            respond(request, 404, b"text/plain", b"there is nothing at this path\n")


def device_route(path: str) -> str:
    """Returns the route pattern of a path on the devices' endpoint, from a small fixed set."""
    if path in _EXACT:
        return path
    match = _REGISTRY.fullmatch(path)
    return f"/v2/{{name}}/{match[1]}/{_REST[match[1]]}" if match else NO_ROUTE
