"""``GET /api/v3/delta``: parses, authorizes and answers delta requests of supervisors
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace

from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.delta_tags import DeltaTags, is_delta_tag
from obdelta.builds.queue import Priority
from obdelta.builds.service import Answer, DeltaService, FullPull, Published, Ready, Takes
from obdelta.builds.types import Pair
from obdelta.builds.verdicts import verdict_of
from obdelta.errors import (
    BadReference,
    BadRequest,
    ForeignHost,
    ObdeltaError,
    StillBuilding,
    TooManyRequests,
    Unavailable,
)
from obdelta.oci import Digest, Reference
from obdelta.registry import CredentialPolicy, Credentials
from obdelta.store.catalogue.records import Kind
from obdelta.web.devices.admission import Admission
from obdelta.web.devices.auth import Grant
from obdelta.web.held_answers import HeldAnswers
from obdelta.web.overload import PATIENCE, RefusedPairs

log = Logger()

NO_ACCESS = "no-access"
"""The category of a full pull for a token that grants nothing."""
WAIT_TRUE = 15 * 60.0
"""Maximum seconds that ``wait=true`` holds a request, as in open-balena-delta; for builders, not
devices.
"""
CROWDED = b"x-obdelta-crowded"
"""Header set by another process of this server that forwards a request of a crowded connection."""
_IMAGE_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)
_MAX_PARAMETER = 2048
_NO_BASE = frozenset(("base-gone", "same-image", "several-platforms"))
"""Categories of full pulls after which no delta can ever be built from that base."""


def one_parameter(request: Request, name: str, *, required: bool = True) -> str:
    """Returns the single value of a query parameter, ``""`` if an optional one is missing. Raises
    BadRequest otherwise.
    """
    values: list[bytes] = request.args.get(name.encode("ascii"), [])
    if not values and not required:
        return ""
    if len(values) != 1 or not (values[0] or not required):
        raise BadRequest(f"the parameter {name} is needed, once")
    if len(values[0]) > _MAX_PARAMETER:
        raise BadRequest(f"the parameter {name} is longer than {_MAX_PARAMETER} bytes")
    try:
        return values[0].decode("ascii")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the parameter {name} is not ASCII") from error


def refuse_crowded(request: Request) -> None:
    """Raises TooManyRequests if the request's connection is above the limit of its address."""
    if getattr(request, "crowded", False) or request.getHeader(CROWDED):
        raise TooManyRequests("there are too many connections from this address")


def image_reference(text: str, hosts: Collection[str]) -> Reference:
    """Returns an image as devices name it, on one of these hosts or without a host. Raises
    BadReference, ForeignHost.
    """
    reference = Reference.parse(text)
    if reference.host and reference.host not in hosts:
        raise ForeignHost(reference.host)
    return reference


def base_reference(text: str, hosts: Collection[str]) -> Reference | Digest:
    """Returns the device's current image: a reference to an image or delta, or an image ID. Raises
    BadReference, ForeignHost.
    """
    match = _IMAGE_ID.fullmatch(text)
    return Digest(match[1]) if match is not None else image_reference(text, hosts)


def target_reference(text: str, hosts: Collection[str]) -> Reference:
    """Returns the image to update to. Raises BadReference, also for a delta, and ForeignHost."""
    reference = image_reference(text, hosts)
    if reference.digest is None and is_delta_tag(reference.tag):
        raise BadReference(text, "it names a delta, not an image")
    return reference


def _name(reference: Reference) -> str:
    return f"{reference.repository}@{reference.selector}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed delta request: two images (the base may be an image ID), and ``dest`` as the device
    wrote it.
    """

    base: Reference | Digest
    target: Reference
    dest: str
    wait: bool

    def names(self) -> tuple[str, str]:
        """Returns both images, equal for all spellings: without the host, with one selector."""
        base = self.base if isinstance(self.base, Digest) else _name(self.base)
        return str(base), _name(self.target)


class DeltaApi:
    """Parses, authorizes and answers delta requests. The v2 API shares everything but the last
    step.
    """

    def __init__(
        self,
        coordinator: DeltaService,
        admission: Admission,
        policy: CredentialPolicy,
        *,
        registry_hosts: frozenset[str],
        public_host: str,
        own: Credentials | None,
        tags: DeltaTags,
        named: Callable[[str, Pair], Awaitable[None]],
        held: HeldAnswers,
        refused: RefusedPairs,
        noted: Callable[[Reference, Reference], Awaitable[None]],
    ) -> None:
        """``own`` is the server's own credentials at the upstream, if any. ``held`` limits how long
        each request may wait. ``noted`` records a requested update (base and target). ``named``
        records the tag that a client received for a pair.
        """
        self._noted, self._held, self._refused = noted, held, refused
        self._coordinator, self._admission, self._policy = coordinator, admission, policy
        self._hosts = registry_hosts | {public_host}
        self._public_host, self._own, self._tags, self._named = public_host, own, tags, named
        self._warned = False

    def parse(self, request: Request) -> Asked:
        """Returns the parsed request. Raises BadRequest, BadReference, ForeignHost."""
        base = base_reference(one_parameter(request, "src"), self._hosts)
        target = target_reference(one_parameter(request, "dest"), self._hosts)
        wait = one_parameter(request, "wait", required=False)
        return Asked(base, target, one_parameter(request, "dest"), wait == "true")

    def client(self, request: Request, asked: Asked) -> str:
        """Returns the client that limits count, for a request that was answered."""
        named = [asked.base.repository] if isinstance(asked.base, Reference) else []
        return self._admission.client(request, [*named, asked.target.repository])

    async def answer(
        self, request: Request, kind: Kind, *, early: Takes | None = None
    ) -> tuple[Asked, Answer]:
        """Returns the parsed request and the coordinator's answer.

        The answer is also a full pull if the pair has been refused for too long because of load.
        """
        asked = self.parse(request)
        pair = (kind, *asked.names())
        try:
            answer = await self._answer(request, asked, kind, early)
        except ObdeltaError as error:
            if not verdict_of(error).load:
                raise
            client = self._admission.counted_client(request)
            if not self._refused.refused(client, *pair):
                raise
            why = f"refused for more than {PATIENCE / 60:g} minutes: {error}"
            return asked, await self._refuse(kind, asked, why, "overload")
        self._refused.accepted(*pair)
        return asked, answer

    async def _answer(
        self, request: Request, asked: Asked, kind: Kind, early: Takes | None
    ) -> Answer:
        named = [asked.base.repository] if isinstance(asked.base, Reference) else []
        needs = [*named, asked.target.repository]
        if asked.wait and self._admission.grants_nothing(request, needs):
            return await self._prepare(request, asked, kind)
        grant = self._admission.admit(request, needs)
        refuse_crowded(request)
        credentials = self._policy.credentials(request.getHeader(b"authorization"))
        base = await self._base(request, asked.base, grant, credentials)
        if base is None:
            return await self._refuse(
                kind, asked, "base is a delta or an image that is not known", "base-unknown"
            )
        target = replace(asked.target, repository=grant.repository(asked.target.repository))
        try:
            answer = await self._coordinator.delta(
                kind,
                base,
                target,
                credentials,
                WAIT_TRUE if asked.wait else self._held.left(request),
                self._admission.limited_client(request, grant),
                early=early,
            )
        except StillBuilding:
            self._refused.accepted(kind, *asked.names())
            await self._note(base, target)
            raise
        if not isinstance(answer, FullPull) or answer.category not in _NO_BASE:
            await self._note(base, target)
        return answer

    async def _refuse(self, kind: Kind, asked: Asked, why: str, category: str) -> FullPull:
        return await self._coordinator.refuse(
            kind, str(asked.base), str(asked.target), why, category
        )

    async def _base(
        self, request: Request, named: Reference | Digest, grant: Grant, credentials: Credentials
    ) -> Reference | None:
        """Returns the image that a device runs, or None if it is unknown. A delta's name stands for
        its target.
        """
        if isinstance(named, Digest):
            images = await self._tags.images_behind_id(named)
            return next((image for image in images if grant.allows(image.repository)), None)
        base = replace(named, repository=grant.repository(named.repository))
        return await self._held.within(request, self._tags.image_behind(base, credentials))

    async def _prepare(self, request: Request, asked: Asked, kind: Kind) -> Answer:
        """Answers a builder, whose token is valid and grants nothing (``docs/access.md``,
        "Builders").

        All failures get the same answer, also for images that do not exist: a builder aborts its
        push at any error.
        """

        async def full_pull(why: str) -> FullPull:
            return await self._refuse(kind, asked, why, NO_ACCESS)

        if self._own is None:
            if not self._warned:
                self._warned = True
                log.warn(
                    "a builder's delta was not prepared: its token grants nothing, and this server"
                    " has no credentials of its own: set builder-token (TOKEN_AUTH_BUILDER_TOKEN)"
                )
            return await full_pull("the server has no credentials of its own")
        if isinstance(asked.base, Digest):
            return await full_pull("an image ID says nothing to a builder's token")
        try:
            with self._admission.unprivileged(request) as client:
                answer = await self._coordinator.delta(
                    kind,
                    asked.base,
                    asked.target,
                    self._own,
                    WAIT_TRUE,
                    client,
                    priority=Priority.UNPRIVILEGED,
                )
        except ObdeltaError as error:
            return await full_pull(str(error))
        # The URL of a batch is a permission to download it.
        return (
            answer
            if kind == "v3"
            else await full_pull("the batch was prepared; the token does not reach it")
        )

    async def _note(self, base: Reference, target: Reference) -> None:
        """Records an update between two images that this client may pull; similar devices will want
        the next release too.
        """
        try:
            await self._noted(base, target)
        except Unavailable as error:
            # A full disk must not stop a device's update.
            log.warn(
                "that a device asked from {base} was not noted: {reason}",
                base=str(base),
                reason=str(error),
            )

    async def _record_name(self, answer: Ready | Published) -> None:
        """Records the tag given to a client, so that it leads to an image even if the delta is
        removed.
        """
        tag = answer.name.tag if isinstance(answer, Published) else answer.delta.tag
        try:
            await self._named(str(tag), answer.pair)
        except Unavailable as error:
            log.warn("the name {tag} was not recorded: {reason}", tag=tag, reason=str(error))

    async def answer_v3(self, request: Request) -> bytes:
        """Returns the JSON body: the delta's name, or the target's own if the device should pull in
        full.
        """
        asked, answer = await self.answer(request, "v3")
        if isinstance(answer, Published | Ready):
            await self._record_name(answer)
        if isinstance(answer, Published):
            name = str(answer.name)
        elif not isinstance(answer, Ready):
            own = asked.target.host or self._public_host
            name = asked.dest if asked.target.host else f"{own}/{asked.dest}"
        else:
            name = str(
                Reference(self._public_host, answer.pair.target.repository, answer.delta.tag)
            )
        return json.dumps({"name": name}).encode()
