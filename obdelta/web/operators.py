"""The operators' endpoint: health, readiness and what is being built. Devices never reach it (setting ``operator-listen``)."""

from __future__ import annotations

import json

from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from obdelta.builds.coordinator import Coordinator
from obdelta.store.blobs import BlobStore
from obdelta.web.site import send

log = Logger()


class OperatorFace(Resource):
    """``/healthz``, ``/readyz``, ``/api/v1/builds``."""

    isLeaf = True

    def __init__(self, coordinator: Coordinator, blobs: BlobStore, clock: IReactorTime) -> None:
        Resource.__init__(self)
        self._coordinator, self._blobs, self._clock = coordinator, blobs, clock

    def render(self, request: Request) -> int:
        """Start an answer."""
        ensureDeferred(self._serve(request)).addErrback(self._failed, request)
        return NOT_DONE_YET

    async def _serve(self, request: Request) -> None:
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"allow", b"GET, HEAD")
            send(request, 405, b"text/plain", b"only GET and HEAD are served here\n")
        elif request.path == b"/healthz":
            send(request, 200, b"text/plain", b"ok\n")
        elif request.path == b"/readyz":
            writable = await self._blobs.writable()
            body = b"ready\n" if writable else b"not ready: the store cannot be written\n"
            send(request, 200 if writable else 503, b"text/plain", body)
        elif request.path == b"/api/v1/builds":
            send(request, 200, b"application/json", self._builds())
        else:
            send(request, 404, b"text/plain", b"there is nothing at this path\n")

    def _builds(self) -> bytes:
        now = self._clock.seconds()
        builds = [
            {
                "pair": str(build.pair),
                "state": "running" if build.started is not None else "queued",
                "seconds": round(now - build.since, 3),
                "waiting": len(build.waiters),
                "progress": dict(build.progress),
            }
            for build in self._coordinator.running
        ]
        return json.dumps({"builds": builds}).encode() + b"\n"

    def _failed(self, failure: Failure, request: Request) -> None:
        log.failure("unexpected error at {path}", failure, path=ascii(request.path))
        if not request.startedWriting:
            send(request, 500, b"text/plain", b"an unexpected error; the log has it\n")
