"""``/api/v2/delta`` and its download: rsync batches behind signed URLs, finished or still being
written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from twisted.web.http import Request

from obdelta.builds.service import DeltaService
from obdelta.builds.types import AcceptsFile, FullPull, Growing, Ready
from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.errors import BadRequest, BlobUnknown, StillBuilding
from obdelta.rootfs.delay import TOKENS
from obdelta.store.file_writer import ExternalFile
from obdelta.web.devices.access.signed_urls import Ticket, UrlSigner, made_of
from obdelta.web.devices.blob_sources import PublishedBatches
from obdelta.web.devices.growing_batches import Padded, send_chunked
from obdelta.web.devices.legacy_batches import LegacyBatches
from obdelta.web.devices.responses import Stored, send, send_stored
from obdelta.web.devices.stored_content import StoredContent, delay_at, padded
from obdelta.web.devices.v3 import NO_ACCESS, DeltaApi

DOWNLOAD_PATH = "/api/v2/delta/download"
FULL_PULL_QUERY = "full-pull=yes"
"""Not signed: the content is the same for every client and reveals nothing."""
MAX_PADDING = 0.1
"""Largest share of padding in a length that is announced before the batch is complete."""
_SUPERVISOR = re.compile(rb"Supervisor/v?([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})")
DELAYED_FULL_PULL_QUERY = "full-pull=delayed"
_FIRST_DELAYED = (16, 2, 33)
"""From this version on, a v2 delta fails unless rsync is busy until the supervisor has closed the
stream (``docs/v2.md``).
"""
_FIRST_WITHOUT_RESUME = (14, 0, 25)
"""From this version on, Node is 14 or newer: an interrupted download is neither resumed nor
aborted.
"""
_REMEMBERED_SECONDS = 86400.0
_MAX_DEVICES = 100_000
"""Maximum number of delayed devices remembered; the oldest is forgotten first."""


def supervisor_version(user_agent: bytes | None) -> tuple[int, int, int] | None:
    """Returns the version in a supervisor's ``User-Agent``, or None for any other client."""
    match = _SUPERVISOR.match(user_agent or b"")
    return None if match is None else (int(match[1]), int(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class V2Policy:
    """Settings of v2 responses.

    ``streaming``: whether clients other than supervisors get batches while they are written.
    ``max_padding_share``: the maximum share of an announced length that may be padding, for
    supervisors. None sends them finished batches only. ``full_pull``: whether devices without a
    delta are sent a full pull; otherwise they get an error.
    """

    streaming: bool
    max_padding_share: float | None
    full_pull: bool

    def early(self, version: tuple[int, int, int] | None) -> AcceptsFile | None:
        """Returns which growing batches a client accepts, or None for none.

        A supervisor needs the length of the body in advance, and must be able to handle an
        interrupted download. Any other client accepts a chunked body.
        """
        if version is None:
            return _accept_any if self.streaming else None
        share = self.max_padding_share
        if share is None or version >= _FIRST_WITHOUT_RESUME:
            return None
        return lambda file: file.bound(share) is not None


def _accept_any(file: ExternalFile) -> bool:
    return True


class DelayedDevices:
    """Counts devices whose supervisor applies a v2 delta only with a delay, by their requests of
    one day. ``seconds`` returns monotonic time.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._clients: ExpiringMap[str, bool] = ExpiringMap(_MAX_DEVICES, seconds)

    def requested(self, client: str) -> None:
        """Records a request of a client."""
        self._clients.set(client, True, _REMEMBERED_SECONDS)

    def note(self) -> str:
        """Returns one line for operators, or an empty string if there are no such devices."""
        count = len(self._clients)
        if not count:
            return ""
        devices = (
            "1 device requests v2 updates"
            if count == 1
            else f"{count:,} devices request v2 updates"
        )
        return (
            f"{devices} with a supervisor that applies them only with a delay:"
            " set BALENA_SUPERVISOR_DELTA_VERSION=3"
        )


class NoDelta(BadRequest):
    """There is no delta for this device, and the operator disabled full pulls (superseded setting
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
        service: DeltaService,
        stored: StoredContent,
        signer: UrlSigner,
        public_url: str,
        policy: V2Policy,
        out_of_sync: bytes,
        delayed_out_of_sync: bytes,
        delayed_devices: DelayedDevices,
        legacy_batches: LegacyBatches | None = None,
        published: PublishedBatches | None = None,
    ) -> None:
        """``legacy_batches`` serves the directory of open-balena-delta, if there is one.
        ``published`` has the batches in the registry, None if none are pushed there.
        """
        self._legacy_batches, self._published = legacy_batches, published
        self._api, self._service, self._stored = api, service, stored
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
            self._delayed_devices.requested(self._api.client(request, requested))
        if isinstance(answer, FullPull):
            if not self._policy.full_pull and answer.category != NO_ACCESS:
                raise NoDelta(answer.reason)
            return f"{self._download}?{DELAYED_FULL_PULL_QUERY if delayed else FULL_PULL_QUERY}"
        if isinstance(answer, Ready):
            if delayed and delay_at(answer.delta) is None:
                return f"{self._download}?{DELAYED_FULL_PULL_QUERY}"
            ticket = Ticket(
                answer.pair.key,
                made_of(answer.delta),
                delay=TOKENS if delayed else 0,
                repository=answer.pair.target.repository if self._published is not None else "",
            )
        elif isinstance(answer, Growing):
            length = 0
            if version is not None and self._policy.max_padding_share is not None:
                length = answer.file.bound(self._policy.max_padding_share) or 0
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
        requested: list[bytes] = request.args.get(b"full-pull", [])
        if len(request.args) == len(requested) == 1 and requested[0] in self._full_pulls:
            send_stored(request, await self._stored.permanent(self._full_pulls[requested[0]]))
            return
        if self._legacy_batches is not None and self._legacy_batches.matches(request.args):
            await self._legacy_batches.download(request)
            return
        ticket = self._signer.check(request.args)
        growing = self._service.growing(ticket.key)
        if (
            growing is not None
            and growing.name == ticket.made
            and not growing.complete
            and growing.failure is None
        ):
            if ticket.length:
                await self._stored.send_batch(request, padded(growing, ticket))
                return
            if await send_chunked(request, growing):
                return
        if (batch := await self._stored_batch(request, ticket)) is not None:
            await self._stored.send_batch(request, batch)
            return
        found = None
        if self._published is not None:
            found = await self._published.find(ticket, self._stored)
        if found is None:
            raise BlobUnknown("of this batch")
        await send(request, found)

    async def _stored_batch(self, request: Request, ticket: Ticket) -> Stored | Padded | None:
        try:
            return await self._stored.batch(request, ticket)
        except BlobUnknown:
            if self._published is None:
                raise
            return None  # the registry may have it
