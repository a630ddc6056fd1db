"""``/api/v2/delta`` and its download: rsync batches behind signed URLs, also while they are still being written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.coordinator import Coordinator, FullPull
from obdelta.errors import BadRequest, BlobUnknown
from obdelta.oci import Digest
from obdelta.store.growing import GrowingFile
from obdelta.web.bodies import RangeNotSatisfiable, abort, parse_range
from obdelta.web.delta_api import DeltaApi
from obdelta.web.finished import Finished
from obdelta.web.signing import UrlSigner

log = Logger()

DOWNLOAD_PATH = "/api/v2/delta/download"
FULL_PULL_QUERY = "full-pull=yes"
"""Not signed: what it leads to is the same for everybody, and tells nothing."""
NO_CHUNKS = b"x-obdelta-no-chunks"
"""A request header between the processes of one server: the device itself spoke HTTP/1.0."""
_SUPERVISOR = re.compile(rb"Supervisor/v?([0-9]+)\.([0-9]+)\.([0-9]+)")
_FIRST_BROKEN = (16, 2, 32)
"""From here on docker-delta fails every v2 delta, and supervisors try again for ever (``docs/v2.md``)."""


def supervisor_version(user_agent: bytes | None) -> tuple[int, int, int] | None:
    """Of a supervisor's ``User-Agent``; None for anybody else."""
    match = _SUPERVISOR.match(user_agent or b"")
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class V2Policy:
    """``streaming``: whether askers other than supervisors get batches as they are written. ``full_pull``: whether devices
    that cannot have a delta are told to pull in full; else they get an error."""

    streaming: bool
    full_pull: bool


class NoDelta(BadRequest):
    """There is no delta for this device, and the operator wants no full pull (setting ``v2-full-pull``)."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"no delta: {why}")


class Batches:
    """Answers with where a batch is, and serves it there. ``out_of_sync`` is the blob that leads to a full pull."""

    def __init__(
        self,
        *,
        api: DeltaApi,
        coordinator: Coordinator,
        finished: Finished,
        signer: UrlSigner,
        public_url: str,
        policy: V2Policy,
        out_of_sync: Digest,
    ) -> None:
        self._api, self._coordinator, self._finished = api, coordinator, finished
        self._signer, self._policy, self._out_of_sync = signer, policy, out_of_sync
        self._download = f"{public_url}{DOWNLOAD_PATH}"

    async def locate(self, request: Request) -> str:
        """The ``Location`` to answer with. Raises NoDelta, StillBuilding and what the API raises."""
        version = supervisor_version(request.getHeader(b"user-agent"))
        # A supervisor wants the length of the body first; anybody else takes it chunked.
        early = self._policy.streaming and version is None
        _, answer = await self._api.answer(request, "v2", early=early, never=_why_never(version))
        if isinstance(answer, FullPull):
            if not self._policy.full_pull:
                raise NoDelta(answer.reason)
            return f"{self._download}?{FULL_PULL_QUERY}"
        return f"{self._download}?{self._signer.sign(answer.pair.key)}"

    async def download(self, request: Request) -> None:
        """Serve a batch: whole or a range, finished or growing. Raises Denied, BlobUnknown before the first byte."""
        if request.args == {b"full-pull": [b"yes"]}:
            self._finished.send(request, self._out_of_sync)
            return
        key = self._signer.check(request.args)
        growing = self._coordinator.growing(key)
        if growing is not None and not growing.complete and await self._follow(request, growing):
            return
        if not await self._finished.batch(request, key):
            raise BlobUnknown("of this batch")

    async def _follow(self, request: Request, growing: GrowingFile) -> bool:
        """Serve what is still being written; False (nothing sent) once it is finished and has a length."""
        wanted = _bounded_range(request)
        whole = request.method == b"GET" and request.getHeader(b"range") is None and _takes_chunks(request)
        if not whole and wanted is None:
            # Without chunks, or for "from here to the end", the length is needed: wait for it.
            await growing.done()
            return False
        start, stop = 0, None
        if wanted is not None:
            start, stop = wanted
            await growing.reached(stop - 1)
            if growing.complete:
                return False
            request.setResponseCode(206)
            request.setHeader(b"content-range", f"bytes {start}-{stop - 1}/*".encode("ascii"))
            request.setHeader(b"content-length", str(stop - start).encode("ascii"))
        request.setHeader(b"content-type", b"application/octet-stream")
        request.setHeader(b"accept-ranges", b"bytes")
        try:
            await growing.deliver(request, start, stop)
        except BaseException:
            # Bytes have left: only a cut connection says that they are not all.
            abort(request)
            raise
        request.finish()
        return True


def _bounded_range(request: Request) -> tuple[int, int] | None:
    """``bytes=a-b`` as ``(a, b + 1)``, for a GET; None for anything else."""
    header = request.getHeader(b"range")
    if header is None or request.method != b"GET" or header.rstrip().endswith(b"-") or b"=-" in header:
        return None
    try:
        found = parse_range(header, 1 << 60)
    except RangeNotSatisfiable:
        return None
    return None if found is None else (found[0], found[0] + found[1])


def _takes_chunks(request: Request) -> bool:
    return request.clientproto == b"HTTP/1.1" and not request.requestHeaders.hasHeader(NO_CHUNKS)


def _why_never(version: tuple[int, int, int] | None) -> str | None:
    if version is not None and version >= _FIRST_BROKEN:
        return f"supervisor {version[0]}.{version[1]}.{version[2]} cannot apply v2 deltas"
    return None
