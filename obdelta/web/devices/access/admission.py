"""Admits requests of devices: which repositories a client may pull (``docs/access.md``), and limits
on the requests of one client.

Handlers call :meth:`Admission.admit` before any look-up, so cached answers are refused as new ones
are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from twisted.web.http import Request

from obdelta.concurrency.limits import Limit
from obdelta.concurrency.watched_file import FileProblem
from obdelta.errors import Denied, Unauthorized, Unavailable
from obdelta.net.client_address import ForwardedClients
from obdelta.oci import Digest
from obdelta.oci.reference import is_repository
from obdelta.store.catalogue.tables.device_pulls import StartedPull, StartedPulls
from obdelta.web.devices.access.token_verifier import (
    PULL,
    ExaminedToken,
    Grant,
    TokenExpired,
    TokenInvalid,
    Verifier,
)


class Access(Protocol):
    """Decides on a request's ``Authorization`` header."""

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Returns the client's grant if it has ``pull`` on all repositories in ``needs``. Any valid
        token will do if ``needs`` is empty.

        With ``aliases`` a name in ``needs`` may be an alias. The caller must then fetch from
        ``grant.repository(name)``. The alias itself may be another repository that was never
        granted.

        Raises Unauthorized (401, with its challenge) if the token is missing or invalid. Raises
        Denied (403) if a valid token does not grant enough.
        """


class OpenAccess:
    """``auth = none``: every client may pull everything. Credentials are ignored."""

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Returns an unlimited grant."""
        return Grant()


class Expired(Unauthorized):
    """A token refused only because it expired: signature, issuer, audience and shape are valid.
    ``token`` is its hash.
    """

    def __init__(self, why: str, challenge: str, grant: Grant, token: str) -> None:
        self.grant, self.token = grant, token
        super().__init__(why, challenge)


class TokenAccess:
    """``auth = token``: requires a Bearer token of the configured issuer.

    The challenge tells clients where to get a token (``realm``) and for which service
    (``service``).
    """

    def __init__(self, verifier: Verifier, *, realm: str, service: str) -> None:
        self._verifier, self._realm, self._service = verifier, realm, service

    def authorize(
        self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False
    ) -> Grant:
        """Implements :meth:`Access.authorize`."""
        if authorization is None:
            raise Unauthorized("a token is needed", self.challenge(needs))
        scheme, _, token = authorization.strip(b" \t").partition(b" ")
        if scheme.lower() != b"bearer":
            raise Unauthorized("a Bearer token is needed", self.challenge(needs))
        try:
            grant = self._verifier.verify(token.strip(b" \t"))
        except TokenExpired as error:
            challenge = self.challenge(needs, error="invalid_token")
            raise Expired(str(error), challenge, error.grant, token_hash(authorization)) from None
        except TokenInvalid as error:
            raise Unauthorized(str(error), self.challenge(needs, error="invalid_token")) from None
        for name in needs:
            if not grant.allows(grant.repository(name) if aliases else name):
                raise Denied(f"the token does not allow {PULL} on {_printable(name)}")
        return grant

    def examine(self, token: bytes) -> ExaminedToken:
        """Returns why a token is refused, claim by claim, for operators."""
        return self._verifier.examine(token)

    def reload(self) -> list[str]:
        """Reads the keys again, even if their file has not changed. Returns why that failed."""
        return self._verifier.reload()

    def key_problem(self) -> FileProblem | None:
        """Returns why the file of the keys cannot be used any more, None if it can."""
        return self._verifier.key_problem()

    def challenge(self, needs: Sequence[str], *, error: str | None = None) -> str:
        """Returns the ``WWW-Authenticate`` value for a request that needs these repositories (RFC
        6750, section 3).
        """
        parameters = [("realm", self._realm), ("service", self._service)]
        scopes = [
            f"repository:{name}:{PULL}" for name in dict.fromkeys(needs) if is_repository(name)
        ]
        if scopes:
            parameters.append(("scope", " ".join(scopes)))
        if error is not None:
            parameters.append(("error", error))
        return "Bearer " + ",".join(f'{name}="{value}"' for name, value in parameters)


def token_hash(authorization: bytes) -> str:
    """Returns the hash of a header's token, which names the token without revealing it."""
    return hashlib.sha256(authorization.strip(b" \t").partition(b" ")[2].strip(b" \t")).hexdigest()


def _printable(name: str) -> str:
    return name if is_repository(name) else "the requested repository"


@dataclass(frozen=True, slots=True)
class PullGrace:
    """The ``pull-grace`` setting: ``seconds`` after its expiry in which a token may finish a pull.

    The token fetches only blobs of deltas whose manifests it fetched before.
    """

    pulls: StartedPulls
    seconds: float
    now: Callable[[], float]


class Admission:
    """Checks a request's token and counts the request against its subject until it ends.

    ``requests`` bounds the requests in flight of one subject. It bounds those of one address if
    tokens name no subject (``auth = none``). If ``grace`` is None, an expired token fetches
    nothing.
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
        """Requests that were admitted with an expired token."""

    def admit(self, request: Request, needs: Sequence[str]) -> Grant:
        """Returns the grant. Must be called once a request.

        Names in ``needs`` may be aliases: fetch from ``grant.repository(name)``. Raises
        Unauthorized, Denied, TooManyRequests.
        """
        grant = self._access.authorize(request.getHeader(b"authorization"), needs, aliases=True)
        self._count(request, grant)
        return grant

    async def admit_blob(self, request: Request, repository: str, digest: Digest) -> Grant:
        """Works as :meth:`admit`, and also admits the rest of a pull that began while its token was
        valid.
        """
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
        """Returns whether this token fetched the manifest of a delta with this blob, and expired
        recently.
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
        """Returns the record that lets the pull of a delta's manifest outlive its token, or None if
        it cannot.
        """
        authorization = request.getHeader(b"authorization")
        if self._grace is None or authorization is None or request not in self._held:
            return None
        try:
            grant = self._access.authorize(authorization, [repository])
        except Unauthorized:
            return None  # it has expired since the request was admitted
        if not grant.subject or grant.expires is None:
            return None
        until = int(grant.expires + self._grace.seconds)
        return StartedPull(token_hash(authorization), grant.subject, repository, until)

    def _count(self, request: Request, grant: Grant) -> None:
        self._held[request] = self._requests.take(self.limited_client(request, grant))
        request.notifyFinish().addBoth(lambda _: self.hand_over(request))

    def grants_nothing(self, request: Request, needs: Sequence[str]) -> bool:
        """Returns whether the request's token is valid and grants nothing, such as a builder's.
        ``needs`` are the repositories that the request needs.

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
        """Counts a request that :meth:`grants_nothing` by its client's address. Yields the client
        that its build is counted for.

        Raises TooManyRequests.
        """
        address = self._clients.address(request)
        with self._unprivileged.hold(address):
            yield f"unprivileged {address}"

    def address(self, request: Request) -> str:
        """Returns the address of a request's client."""
        return self._clients.address(request)

    def hand_over(self, request: Request) -> None:
        """Stops counting a request that has ended or that another process counts from now on.
        Requests that were not admitted are ignored.
        """
        self._expired.pop(request, None)
        release = self._held.pop(request, None)
        if release is not None:
            release()

    def require_pull(self, request: Request, needs: Sequence[str]) -> None:
        """Checks that an admitted request may pull these repositories too (real names, no aliases).
        Raises Unauthorized, Denied.
        """
        expired = self._expired.get(request)
        if expired is None:
            self._access.authorize(request.getHeader(b"authorization"), needs)
        elif not all(map(expired.allows, needs)):
            raise Denied(f"the token does not allow {PULL} on all repositories of the request")

    def client(self, request: Request, needs: Sequence[str]) -> str:
        """Returns the result of :meth:`limited_client` for a request that was admitted before."""
        return self.limited_client(
            request,
            self._access.authorize(request.getHeader(b"authorization"), needs, aliases=True),
        )

    def counted_client(self, request: Request) -> str:
        """Returns the same as :meth:`limited_client`, for any request; the address if the token is
        not valid.
        """
        try:
            grant = self._access.authorize(request.getHeader(b"authorization"), [])
        except (Unauthorized, Denied):
            return f"address {self._clients.address(request)}"
        return self.limited_client(request, grant)

    def subject(self, request: Request) -> str:
        """Returns the subject of a request's token, also of an expired one; "" if there is none,
        or the token is not valid.
        """
        try:
            return self._access.authorize(request.getHeader(b"authorization"), []).subject
        except Expired as error:
            return error.grant.subject
        except (Unauthorized, Denied):
            return ""

    def limited_client(self, request: Request, grant: Grant) -> str:
        """Returns the key that limits count by: the token's subject, else the client's address."""
        return (
            f"subject {grant.subject}"
            if grant.subject
            else f"address {self._clients.address(request)}"
        )
