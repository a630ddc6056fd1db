"""``/api/v1/prepare``: builds deltas before devices ask for them, and reports their progress."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any, cast

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.inputs.image_lookup import SeveralPlatforms
from obdelta.builds.prebuild import MAX_JOBS, Job, PrebuildLists, Preparation
from obdelta.errors import BadRequest
from obdelta.oci import Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import Kind
from obdelta.store.catalogue.tables.refreshed_rows import UpdateHistory
from obdelta.web.devices.v3 import target_reference
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json
from obdelta.web.operators.sse import Events, EventStream, Readers

log = Logger()

READERS = 32
"""Maximum number of event streams at a time."""
RelatedImages = Callable[[Reference, Credentials, int], Awaitable[list[Reference]]]
"""Returns images that devices run and that an image is the next release of, at most the given
number (``obdelta.builds.inputs.related_images``).
"""
_KEYS = frozenset(("pairs", "dest", "last", "like", "kinds", "rollback"))
_SHAPE = 'the body is {"pairs": [{"src": …, "dest": …}, …]} or {"dest": …, "last": N}'


class PrepareApi:
    """Serves ``/api/v1/prepare``. ``credentials`` turns an ``X-Registry-Authorization`` header into
    upstream credentials.
    """

    def __init__(
        self,
        lists: PrebuildLists,
        history: UpdateHistory,
        related_images: RelatedImages,
        credentials: Callable[[bytes | None], Credentials],
        registry_hosts: Collection[str],
        clock: IReactorTime,
    ) -> None:
        self._preparing, self._history, self._related_images, self._credentials = (
            lists,
            history,
            related_images,
            credentials,
        )
        self._hosts, self._clock = frozenset(registry_hosts), clock
        self._readers = Readers(READERS)

    def add_to(self, routes: Routes) -> None:
        routes.add("POST", "/api/v1/prepare", self.begin)
        routes.add("GET", "/api/v1/prepare/{id}", self.state)
        routes.add("GET", "/api/v1/prepare/{id}/events", self.events)

    async def begin(self, call: Call) -> Answer:
        """Starts a list of builds. Answers 202 at once, with the jobs' IDs."""
        body = call.json()
        if unknown := body.keys() - _KEYS:
            raise BadRequest(f"{_SHAPE}; {sorted(unknown)[0][:40]!a} is not known")
        kinds = _kinds(body.get("kinds", ["v3"]))
        # Not `Authorization`: that may be a login at a proxy before this endpoint, which the
        # registry must not see.
        credentials = self._credentials(call.request.getHeader(b"x-registry-authorization"))
        pairs = await self._pairs(body, credentials)
        rollback = body.get("rollback", False)
        if not isinstance(rollback, bool):
            raise BadRequest("rollback is true or false")
        if rollback:
            pairs += [(target, base) for base, target in pairs]
        pairs = [(base, target) for base, target in pairs if base != target]
        if len(pairs) * len(kinds) > MAX_JOBS:
            raise BadRequest(f"more than {MAX_JOBS} deltas are requested")
        if not pairs and "pairs" in body:
            raise BadRequest("base and target are the same image")
        if not pairs:
            raise BadRequest(
                "no device runs an image that shares layers with this one: name the bases "
                "(pairs), or a similar image (like)"
            )
        preparation = self._preparing.begin(pairs, kinds, credentials)
        log.info(
            "operator action: user={user} action=prepare list={id} deltas={count}",
            user=call.user,
            id=preparation.id,
            count=len(preparation.jobs),
        )
        return as_json(preparation.as_json(), 202)

    async def _pairs(
        self, body: dict[str, object], credentials: Credentials
    ) -> list[tuple[Reference, Reference]]:
        if "pairs" in body:
            given = body["pairs"]
            if body.keys() & {"dest", "last", "like"} or not isinstance(given, list) or not given:
                raise BadRequest(_SHAPE)
            return [self._pair(one) for one in given]
        target = self._image(body.get("dest"))
        last = body.get("last")
        if not isinstance(last, int) or isinstance(last, bool) or not 1 <= last <= MAX_JOBS:
            raise BadRequest(f"last must be a number of bases from 1 to {MAX_JOBS}")
        bases = await self._history.bases(target.repository, last)
        if "like" in body:
            # The release that devices run, and the bases that they came from.
            like = self._image(body["like"])
            bases += [like, *await self._history.bases(like.repository, last)]
        elif not bases:
            # A new release, whose repository no device has requested yet.
            try:
                bases = await self._related_images(target, credentials, last)
            except SeveralPlatforms as error:
                raise BadRequest(str(error)) from error
        unique = {
            base.repository: base
            for base in reversed(bases)
            if base.repository != target.repository
        }
        return [(base, target) for base in reversed(unique.values())][:last]

    def _pair(self, value: object) -> tuple[Reference, Reference]:
        if not isinstance(value, dict) or value.keys() != {"src", "dest"}:
            raise BadRequest(_SHAPE)
        return self._image(value["src"]), self._image(value["dest"])

    def _image(self, value: object) -> Reference:
        if not isinstance(value, str):
            raise BadRequest(_SHAPE)
        found = target_reference(value, self._hosts)
        return Reference("", found.repository, found.tag, found.digest)

    async def state(self, call: Call) -> Answer:
        """Returns the state of a list or of one job."""
        return as_json(self._find(call).as_json())

    async def events(self, call: Call) -> Answer:
        """Streams an event named after each job when it changes (all jobs first), and ``done`` at
        the end.
        """
        found = self._find(call)
        if isinstance(found, Job):
            raise NotFound("a list has events, not a job")
        return Events(
            lambda stream: _follow(found, stream), self._clock, self._readers, call.client
        )

    def _find(self, call: Call) -> Preparation | Job:
        found = self._preparing.find(call.parameters["id"])
        if found is None:
            raise NotFound("no such list or job is remembered")
        return found


def _follow(preparation: Preparation, stream: EventStream) -> Callable[[], None]:
    def report(job: Job | None) -> None:
        if job is None:
            stream.send("done", json.dumps(preparation.as_json()))
            stream.end()
        else:
            stream.send(job.id, json.dumps(job.as_json()))

    def detach() -> None:
        if report in preparation.listeners:
            preparation.listeners.remove(report)

    for job in preparation.jobs:
        report(job)
    if preparation.done:
        report(None)
    else:
        preparation.listeners.append(report)
    return detach


def _kinds(value: Any) -> list[Kind]:
    if not isinstance(value, list) or not value or not all(kind in ("v2", "v3") for kind in value):
        raise BadRequest('kinds is a list of "v2" and "v3"')
    return [cast(Kind, kind) for kind in dict.fromkeys(value)]
