"""Who is let in, and how much of a server one client may take: asked by the faces before anything
is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from twisted.web.http import Request

from obdelta.concurrency.limits import Limit
from obdelta.errors import Denied, Unauthorized, Unavailable
from obdelta.net.client_address import ForwardedClients
from obdelta.oci import Digest
from obdelta.store.catalogue.started_pulls import StartedPull, StartedPulls
from obdelta.web.devices.auth import PULL, Access, Expired, Grant, token_hash


@dataclass(frozen=True, slots=True)
class PullGrace:
    """How long after its expiry a token still fetches the blobs of deltas whose manifests it
    fetched before (``pull-grace``).
    """

    pulls: StartedPulls
    seconds: float
    now: Callable[[], float]


class Admission:
    """Checks a request's token and counts it against its subject until it ends.

    ``requests`` bounds the requests in flight of one subject; where tokens name none (``auth =
    none``), of one address. ``grace`` None: an expired token fetches nothing.
    """

    def __init__(
        self,
        access: Access,
        requests: Limit,
        clients: ForwardedClients,
        grace: PullGrace | None = None,
        unprivileged: Limit | None = None,
    ) -> None:
        """``unprivileged`` bounds, by client address, the requests whose token grants nothing."""
        self._access, self._requests, self._clients, self._grace = access, requests, clients, grace
        self._unprivileged = unprivileged or Limit(0, "requests of builders from one address")
        self._held: dict[Request, Callable[[], None]] = {}
        self._expired: dict[Request, Grant] = {}
        """Requests that were admitted with a token that has expired."""

    def admit(self, request: Request, needs: Sequence[str]) -> Grant:
        """The grant; names in ``needs`` may be aliases: fetch from ``grant.repository(name)``. Call
        it once a request.

        Raises Unauthorized, Denied, TooManyRequests.
        """
        grant = self._access.authorize(request.getHeader(b"authorization"), needs, aliases=True)
        self._count(request, grant)
        return grant

    async def admit_blob(self, request: Request, repository: str, digest: Digest) -> Grant:
        """As :meth:`admit`; also admits the rest of a pull that began while its token was valid."""
        try:
            return self.admit(request, [repository])
        except Expired as error:
            if not await self._continues(error, repository, digest):
                raise
            grant = error.grant
        self._count(request, grant)
        self._expired[request] = grant
        return grant

    async def _continues(self, expired: Expired, repository: str, digest: Digest) -> bool:
        """Whether this very token fetched the manifest of a delta that has this blob, and has not
        expired too long ago.
        """
        grant, grace = expired.grant, self._grace
        if grace is None or grant.expires is None or grace.now() >= grant.expires + grace.seconds:
            return False
        name = grant.repository(repository)
        if not grant.subject or not grant.allows(name):
            return False
        try:
            return await grace.pulls.includes(
                expired.token, grant.subject, name, digest, grace.now()
            )
        except Unavailable:
            return False

    def started_pull(self, request: Request, repository: str) -> StartedPull | None:
        """What to note of a request for a delta's manifest, so that its pull may outlive the token;
        None: nothing.
        """
        authorization = request.getHeader(b"authorization")
        if self._grace is None or authorization is None or request not in self._held:
            return None
        try:
            grant = self._access.authorize(authorization, [repository])
        except Unauthorized:
            return None  # it has expired a moment ago
        if not grant.subject or grant.expires is None:
            return None
        until = int(grant.expires + self._grace.seconds)
        return StartedPull(token_hash(authorization), grant.subject, repository, until)

    def _count(self, request: Request, grant: Grant) -> None:
        self._held[request] = self._requests.take(self.limited_client(request, grant))
        request.notifyFinish().addBoth(lambda _: self.hand_over(request))

    def grants_nothing(self, request: Request, needs: Sequence[str]) -> bool:
        """Whether the request has a valid token that grants nothing, such as a builder's; ``needs``
        is what it would need.

        Raises Unauthorized.
        """
        authorization = request.getHeader(b"authorization")
        try:
            self._access.authorize(authorization, needs, aliases=True)
        except Denied:
            return not self._access.authorize(authorization, []).actions
        return False

    @contextmanager
    def unprivileged(self, request: Request) -> Iterator[str]:
        """Counts a request that :meth:`grants_nothing` by its client's address; yields whom its
        build counts for.

        Raises TooManyRequests.
        """
        address = self._clients.address(request)
        with self._unprivileged.hold(address):
            yield f"unprivileged {address}"

    def hand_over(self, request: Request) -> None:
        """From here on another process counts it, or it has ended. Also for requests that were not
        admitted.
        """
        self._expired.pop(request, None)
        give_back = self._held.pop(request, None)
        if give_back is not None:
            give_back()

    def also(self, request: Request, needs: Sequence[str]) -> None:
        """Whether a request that was admitted may have these (real names) too. Raises Unauthorized,
        Denied.
        """
        expired = self._expired.get(request)
        if expired is None:
            self._access.authorize(request.getHeader(b"authorization"), needs)
        elif not all(map(expired.allows, needs)):
            raise Denied(f"the token does not allow {PULL} on all that is needed")

    def client(self, request: Request, needs: Sequence[str]) -> str:
        """Returns what :meth:`limited_client` does, for a request that was admitted before."""
        return self.limited_client(
            request,
            self._access.authorize(request.getHeader(b"authorization"), needs, aliases=True),
        )

    def limited_client(self, request: Request, grant: Grant) -> str:
        """What limits are counted by: the token's subject, else the client's address."""
        return (
            f"subject {grant.subject}"
            if grant.subject
            else f"address {self._clients.address(request)}"
        )
