"""``GET /api/v3/delta``: parses, authorizes and answers delta requests of supervisors
(``docs/wire-protocol.md``).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace

from twisted.logger import Logger
from twisted.web.http import Request

from obdelta.builds.inputs.delta_names import DeltaNames
from obdelta.builds.publish.delta_tags import is_delta_tag, tag_in
from obdelta.builds.queue import Priority
from obdelta.builds.service import DeltaService
from obdelta.builds.types import AcceptsFile, Answer, FullPull, Published, Ready
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
from obdelta.web.delta_form import requested_form
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.access.token_verifier import Grant
from obdelta.web.devices.retries import REFUSAL_LIMIT, HeldAnswers, RefusedPairs

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
class DeltaRequest:
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


@dataclass(frozen=True, slots=True)
class _Update:
    """The images and credentials of a client that may pull both. Limits count for ``client``."""

    base: Reference
    target: Reference
    credentials: Credentials
    client: str


class DeltaApi:
    """Parses, authorizes and answers delta requests. The v2 API shares everything but the last
    step.
    """

    def __init__(
        self,
        service: DeltaService,
        admission: Admission,
        policy: CredentialPolicy,
        *,
        registry_hosts: frozenset[str],
        public_host: str,
        own_credentials: Credentials | None,
        tags: DeltaNames,
        held: HeldAnswers,
        refused: RefusedPairs,
        record_update: Callable[[Reference, Reference, float], Awaitable[None]],
        manifests: bool,
    ) -> None:
        """``own_credentials`` are the server's own at the upstream, if any.

        ``held`` limits how long each request may wait. ``record_update`` records a requested update
        (base, target, seconds UTC). ``manifests``: whether devices fetch the manifests of deltas
        from this server, so that it sees which engines they have.
        """
        self._manifests = manifests
        self._record_update, self._held, self._refused = record_update, held, refused
        self._service, self._admission, self._policy = service, admission, policy
        self._hosts = registry_hosts | {public_host}
        self._public_host, self._own_credentials = public_host, own_credentials
        self._tags, self._warned = tags, False

    def parse(self, request: Request) -> DeltaRequest:
        """Returns the parsed request. Raises BadRequest, BadReference, ForeignHost."""
        base = base_reference(one_parameter(request, "src"), self._hosts)
        target = target_reference(one_parameter(request, "dest"), self._hosts)
        wait = one_parameter(request, "wait", required=False)
        return DeltaRequest(base, target, one_parameter(request, "dest"), wait == "true")

    def client(self, request: Request, requested: DeltaRequest) -> str:
        """Returns the client for which limits count a request that was answered."""
        named = [requested.base.repository] if isinstance(requested.base, Reference) else []
        return self._admission.client(request, [*named, requested.target.repository])

    async def answer(
        self, request: Request, kind: Kind, *, early: AcceptsFile | None = None
    ) -> tuple[DeltaRequest, Answer]:
        """Returns the parsed request and the build service's answer.

        The answer is also a full pull if the pair has been refused for too long because of load.
        """
        requested = self.parse(request)
        pair = (kind, *requested.names())
        update: _Update | None = None
        try:
            admitted = await self._admit(request, requested, kind)
            if isinstance(admitted, _Update):
                update = admitted
                answer = await self._service.delta(
                    kind,
                    update.base,
                    update.target,
                    update.credentials,
                    WAIT_TRUE if requested.wait else self._held.seconds_left(request),
                    update.client,
                    early=early,
                    form=requested_form(request, engine_follows=self._manifests),
                )
            else:
                answer = admitted
        except StillBuilding:
            self._refused.accepted(*pair)
            await self._note(update)
            raise
        except ObdeltaError as error:
            if not verdict_of(error).load:
                raise
            client = self._admission.counted_client(request)
            if not self._refused.refused(client, *pair):
                raise
            why = f"refused for more than {REFUSAL_LIMIT / 60:g} minutes: {error}"
            return requested, await self._refuse(kind, requested, why, "overload")
        self._refused.accepted(*pair)
        if not isinstance(answer, FullPull) or answer.category not in _NO_BASE:
            await self._note(update)
        return requested, answer

    async def _admit(
        self, request: Request, requested: DeltaRequest, kind: Kind
    ) -> _Update | Answer:
        """Returns the update of an admitted client, or an answer that needs none. Raises as
        :meth:`Admission.admit` does.
        """
        named = [requested.base.repository] if isinstance(requested.base, Reference) else []
        needs = [*named, requested.target.repository]
        if requested.wait and self._admission.grants_nothing(request, needs):
            return await self._prepare(request, requested, kind)
        grant = self._admission.admit(request, needs)
        refuse_crowded(request)
        credentials = self._policy.credentials(request.getHeader(b"authorization"))
        base = await self._base(request, requested.base, grant, credentials)
        if base is None:
            return await self._refuse(
                kind, requested, "base is a delta or an image that is not known", "base-unknown"
            )
        target = replace(requested.target, repository=grant.repository(requested.target.repository))
        client = self._admission.limited_client(request, grant)
        return _Update(base, target, credentials, client)

    async def _refuse(
        self, kind: Kind, requested: DeltaRequest, why: str, category: str
    ) -> FullPull:
        return await self._service.refuse(
            kind, str(requested.base), str(requested.target), why, category
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

    async def _prepare(self, request: Request, requested: DeltaRequest, kind: Kind) -> Answer:
        """Answers a builder, whose token is valid and grants nothing (``docs/access.md``,
        "Builders").

        All failures get the same answer, also for images that do not exist: a builder aborts its
        push at any error.
        """

        async def full_pull(why: str) -> FullPull:
            return await self._refuse(kind, requested, why, NO_ACCESS)

        if self._own_credentials is None:
            if not self._warned:
                self._warned = True
                log.warn(
                    "a builder's delta was not prepared: its token grants nothing, and this server"
                    " has no credentials of its own: set builder-token (TOKEN_AUTH_BUILDER_TOKEN)"
                )
            return await full_pull("the server has no credentials of its own")
        if isinstance(requested.base, Digest):
            return await full_pull("a builder's token does not grant an image ID")
        try:
            with self._admission.unprivileged(request) as client:
                answer = await self._service.delta(
                    kind,
                    requested.base,
                    requested.target,
                    self._own_credentials,
                    WAIT_TRUE,
                    client,
                    priority=Priority.UNPRIVILEGED,
                    form=requested_form(request, engine_follows=self._manifests),
                )
        except ObdeltaError as error:
            return await full_pull(str(error))
        # The URL of a batch is a permission to download it.
        return (
            answer
            if kind == "v3"
            else await full_pull("the batch was built, but the token does not grant it")
        )

    async def _note(self, update: _Update | None) -> None:
        """Records an update between two images that this client may pull; similar devices will want
        the next release too.
        """
        if update is None:
            return
        try:
            await self._record_update(update.base, update.target, time.time())
        except Unavailable as error:
            # A full disk must not stop a device's update.
            log.warn(
                "the update from {base} was not recorded: {reason}",
                base=str(update.base),
                reason=str(error),
            )

    async def answer_v3(self, request: Request) -> bytes:
        """Returns the JSON body: the delta's name, or the target's own if the device should pull in
        full.
        """
        requested, answer = await self.answer(request, "v3")
        if isinstance(answer, Published):
            tag = str(answer.name.tag)
            await self._tags.record(tag, answer.pair)
            name = str(answer.name.with_tag(tag_in(tag) if self._manifests else tag))
        elif isinstance(answer, Ready):
            tag = tag_in(str(answer.delta.tag))
            await self._tags.record(tag, answer.pair)
            name = str(Reference(self._public_host, answer.pair.target.repository, tag))
        elif requested.target.host:
            name = requested.dest
        else:
            name = f"{self._public_host}/{requested.dest}"
        return json.dumps({"name": name}).encode()
