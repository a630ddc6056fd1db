"""Who is let in, and how much of a server one asker may take: asked by the faces before anything is looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.web.http import Request

from obdelta.net.limits import Limit
from obdelta.net.proxy import ForwardedClients
from obdelta.web.access import Access, Grant


class Admission:
    """Checks a request's token and counts it against its subject until it ends.

    ``requests`` bounds the requests in flight of one subject; where tokens name none (``auth = none``), of one address.
    """

    def __init__(self, access: Access, requests: Limit, clients: ForwardedClients) -> None:
        self._access, self._requests, self._clients = access, requests, clients
        self._held: dict[Request, Callable[[], None]] = {}

    def admit(self, request: Request, needs: Sequence[str]) -> Grant:
        """The grant; names in ``needs`` may be aliases: fetch from ``grant.repository(name)``. Call it once a request.

        Raises Unauthorized, Denied, TooManyRequests.
        """
        grant = self._access.authorize(request.getHeader(b"authorization"), needs, aliases=True)
        self._held[request] = self._requests.take(self.asker(request, grant))
        request.notifyFinish().addBoth(lambda _: self.hand_over(request))
        return grant

    def hand_over(self, request: Request) -> None:
        """From here on another process counts it, or it has ended. Also for requests that were not admitted."""
        give_back = self._held.pop(request, None)
        if give_back is not None:
            give_back()

    def also(self, request: Request, needs: Sequence[str]) -> None:
        """Whether a request that was admitted may have these (real names) too. Raises Unauthorized, Denied."""
        self._access.authorize(request.getHeader(b"authorization"), needs)

    def asker(self, request: Request, grant: Grant) -> str:
        """What limits are counted by: the token's subject, else the client's address."""
        return f"subject {grant.subject}" if grant.subject else f"address {self._clients.address(request)}"
