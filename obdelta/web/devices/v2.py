"""``/api/v2/delta`` and its download: rsync batches behind signed URLs, finished or still being
written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.service import DeltaService, FullPull, Growing, Ready, Takes
from obdelta.errors import BadRequest, BlobUnknown, StillBuilding
from obdelta.rootfs.delay import TOKENS
from obdelta.store.file_writer import ExternalFile
from obdelta.web.delayed_devices import DelayedDevices
from obdelta.web.devices.growing_responses import follow
from obdelta.web.devices.legacy_batches import LegacyBatches
from obdelta.web.devices.signed_urls import Ticket, UrlSigner, made_of
from obdelta.web.devices.stored_content import StoredContent, delay_at
from obdelta.web.devices.v3 import NO_ACCESS, DeltaApi

log = Logger()

DOWNLOAD_PATH = "/api/v2/delta/download"
FULL_PULL_QUERY = "full-pull=yes"
"""Not signed: the content is the same for every client and reveals nothing."""
_SUPERVISOR = re.compile(rb"Supervisor/v?([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})")
DELAYED_FULL_PULL_QUERY = "full-pull=delayed"
_FIRST_DELAYED = (16, 2, 33)
"""From this version on, a v2 delta fails unless rsync is busy until the supervisor has closed the
stream (``docs/v2.md``).
"""
_FIRST_STUCK = (14, 0, 25)
"""From this version on, Node is 14 or newer: an interrupted download is neither resumed nor
aborted.
"""


def supervisor_version(user_agent: bytes | None) -> tuple[int, int, int] | None:
    """Returns the version in a supervisor's ``User-Agent``, or None for any other client."""
    match = _SUPERVISOR.match(user_agent or b"")
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class V2Policy:
    """Settings of v2 responses.

    ``streaming``: whether clients other than supervisors get batches while they are written.
    ``filling``: the maximum share of an announced length that may be padding, for supervisors. None
    sends them finished batches only. ``full_pull``: whether devices without a delta are sent a full
    pull; otherwise they get an error.
    """

    streaming: bool
    filling: float | None
    full_pull: bool

    def early(self, version: tuple[int, int, int] | None) -> Takes | None:
        """Returns which growing batches a client accepts, or None for none.

        A supervisor needs the length of the body in advance, and must be able to handle an
        interrupted download. Any other client accepts a chunked body.
        """
        if version is None:
            return _anything if self.streaming else None
        share = self.filling
        if share is None or version >= _FIRST_STUCK:
            return None
        return lambda file: file.bound(share) is not None


def _anything(file: ExternalFile) -> bool:
    return True


class NoDelta(BadRequest):
    """There is no delta for this device, and the operator disabled full pulls (setting
    ``v2-full-pull``).
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"no delta: {why}")


class Batches:
    """Answers with the URL of a batch, and serves the batch there.

    ``out_of_sync`` and ``delayed_out_of_sync`` are the batches that cause a full pull.
    """

    def __init__(
        self,
        *,
        api: DeltaApi,
        coordinator: DeltaService,
        finished: StoredContent,
        signer: UrlSigner,
        public_url: str,
        policy: V2Policy,
        out_of_sync: bytes,
        delayed_out_of_sync: bytes,
        delayed_devices: DelayedDevices,
        peer: LegacyBatches | None = None,
    ) -> None:
        """``peer`` serves the folder that open-balena-delta left behind, if there is one."""
        self._legacy_batches = peer
        self._api, self._coordinator, self._finished = api, coordinator, finished
        self._signer, self._policy = signer, policy
        self._delayed_devices = delayed_devices
        self._full_pulls = {b"yes": out_of_sync, b"delayed": delayed_out_of_sync}
        self._download = f"{public_url}{DOWNLOAD_PATH}"

    async def locate(self, request: Request) -> str:
        """Returns the ``Location`` for a request. Raises NoDelta, StillBuilding and the API's
        errors.
        """
        version = supervisor_version(request.getHeader(b"user-agent"))
        early = self._policy.early(version)
        delayed = version is not None and version >= _FIRST_DELAYED
        requested, answer = await self._api.answer(request, "v2", early=early)
        if delayed:
            self._delayed_devices.asked(self._api.client(request, requested))
        if isinstance(answer, FullPull):
            if not self._policy.full_pull and answer.category != NO_ACCESS:
                raise NoDelta(answer.reason)
            return f"{self._download}?{DELAYED_FULL_PULL_QUERY if delayed else FULL_PULL_QUERY}"
        if isinstance(answer, Ready):
            if delayed and delay_at(answer.delta) is None:
                return f"{self._download}?{DELAYED_FULL_PULL_QUERY}"
            ticket = Ticket(answer.pair.key, made_of(answer.delta), delay=TOKENS if delayed else 0)
        elif isinstance(answer, Growing):
            length = 0
            if version is not None and self._policy.filling is not None:
                length = answer.file.bound(self._policy.filling) or 0
                if not length:  # the build has ended meanwhile
                    raise StillBuilding
            ticket = Ticket(answer.pair.key, answer.file.name, length)
        else:
            raise TypeError("batches are published nowhere else")
        return f"{self._download}?{self._signer.sign(ticket)}"

    async def download(self, request: Request) -> None:
        """Sends a batch, whole or a range, finished or growing. Raises Denied, BlobUnknown before
        the first byte.
        """
        wanted: list[bytes] = request.args.get(b"full-pull", [])
        if len(request.args) == len(wanted) == 1 and wanted[0] in self._full_pulls:
            await self._finished.send_kept(request, self._full_pulls[wanted[0]])
            return
        if self._legacy_batches is not None and self._legacy_batches.wants(request.args):
            await self._legacy_batches.download(request)
            return
        ticket = self._signer.check(request.args)
        growing = self._coordinator.growing(ticket.key)
        if (
            growing is not None
            and growing.name == ticket.made
            and not growing.complete
            and growing.failure is None
        ):
            if ticket.length:
                await self._finished.filled(request, growing, ticket)
                return
            if await follow(request, growing):
                return
        if not await self._finished.batch(request, ticket):
            raise BlobUnknown("of this batch")
