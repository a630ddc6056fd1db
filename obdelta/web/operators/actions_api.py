"""API of the list of deltas, and of actions on them: retry, cancel, drop, forget, pin."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from obdelta.builds.delta_actions import DeltaActions
from obdelta.errors import BadReference, BadRequest
from obdelta.oci import Digest, Form, ImageNames, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.listed_deltas import SORTS, ListedDelta, ListFilter
from obdelta.store.catalogue.tables.refreshed_rows import NamedImages
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json

STATES = ("kept", "building", "queued", "failed", "skipped", "pinned")
LIMIT, MAX_LIMIT = 100, 1000
MAX_SEARCH, MAX_WORDS = 200, 8
"""Characters and words of a search. Each word is looked for in every row, in the database's only
thread: eight words in 11,000 rows with names take 0.4 s there.
"""


_FLEET_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(/[\w.-]{1,64})?", re.ASCII)
"""A fleet, or a fleet and a service, as images call themselves."""


class ActionsApi:
    """Serves the list and the actions below ``/api/v1/deltas/``.

    ``credentials`` turns an ``X-Registry-Authorization`` header into upstream credentials.
    """

    def __init__(
        self,
        actions: DeltaActions,
        credentials: Callable[[bytes | None], Credentials],
        names: NamedImages,
    ) -> None:
        self._actions, self._credentials = actions, credentials
        self._names = names

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/deltas/list", self.list)
        routes.add("GET", "/api/v1/deltas/{id}", self.one)
        routes.add("POST", "/api/v1/deltas/{id}/{action}", self.act)

    async def list(self, call: Call) -> Answer:
        """Returns a page of deltas, builds and failures. ``next`` is the value of ``after`` for the
        next page.
        """
        wanted = await wanted_of(call, self._actions)
        sort, limit = sort_of(call), _limit_of(call)
        found = await self._actions.page(wanted, sort, limit + 1, cursor_of(call))
        shown = found[:limit]
        return as_json(
            {
                "deltas": await self._objects(shown),
                "next": cursor(shown[-1], sort) if len(found) > limit else None,
            }
        )

    async def one(self, call: Call) -> Answer:
        """Returns one entry."""
        (shown,) = await self._objects([await self._actions.find(call.parameters["id"])])
        return as_json(shown)

    async def _objects(self, deltas: Sequence[ListedDelta]) -> Sequence[dict[str, Any]]:
        wanted = [digest for delta in deltas for digest in (delta.key.base, delta.key.target)]
        names = await self._names.of(wanted)
        return [as_object(delta, names) for delta in deltas]

    async def act(self, call: Call) -> Answer:
        """Does an action, and returns the new state."""
        action = call.parameters["action"]
        if action not in self._actions.names:
            raise NotFound(f"the actions are {', '.join(self._actions.names)}")
        if call.json():
            raise BadRequest("the body is {}")
        credentials = self._credentials(call.request.getHeader(b"x-registry-authorization"))
        done = await self._actions.act(action, call.parameters["id"], credentials, call.user)
        (shown,) = await self._objects([done])
        return as_json(shown)


async def wanted_of(call: Call, actions: DeltaActions) -> ListFilter:
    """Returns the filter of a query. Raises BadRequest."""
    search, fleet = call.argument("search") or "", call.argument("fleet")
    if len(search) > MAX_SEARCH:
        raise BadRequest(f"search has at most {MAX_SEARCH} characters")
    if len(search.split()) > MAX_WORDS:
        raise BadRequest(f"search has at most {MAX_WORDS} words")
    members = None
    if fleet:
        members = await actions.fleet_of(_repository_of(fleet), fleet)
    return ListFilter(
        kind=_choice(call, "kind", ("v2", "v3")),
        form=_choice(call, "form", [form.value for form in Form]),
        state=_choice(call, "state", STATES),
        search=search,
        fleet=members,
    )


def _repository_of(fleet: str) -> str:
    """Returns the repository that a fleet is named by, "" for the name of a fleet that is no
    repository. Raises BadReference.
    """
    try:
        return Reference.parse(fleet).repository
    except BadReference:
        if _FLEET_NAME.fullmatch(fleet):
            return ""
        raise


def sort_of(call: Call) -> str:
    """Returns the order of a query. Raises BadRequest."""
    return _choice(call, "sort", list(SORTS)) or "newest"


def cursor(last: ListedDelta, sort: str) -> str:
    """Returns where the page after an entry begins."""
    return base64.urlsafe_b64encode(json.dumps([last.value(sort), last.id]).encode()).decode()


def cursor_of(call: Call) -> tuple[int, str] | None:
    """Returns the value and the ID of ``after``. Raises BadRequest."""
    after = call.argument("after")
    if not after:
        return None
    try:
        value, id_ = json.loads(base64.urlsafe_b64decode(after.encode("ascii")))
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise BadRequest("after is not a value of next from an earlier page") from error
    if not isinstance(id_, str) or type(value) is not int or not 0 <= value < 1 << 62:
        raise BadRequest("after is not a value of next from an earlier page")
    return value, id_


def _choice(call: Call, name: str, values: Any) -> str:
    given = call.argument(name) or ""
    if given and given not in values:
        raise BadRequest(f"{name} is one of {', '.join(values)}")
    return given


def _limit_of(call: Call) -> int:
    given = call.argument("limit") or str(LIMIT)
    if not given.isdecimal() or not given.isascii() or not 1 <= int(given[:9]) <= MAX_LIMIT:
        raise BadRequest(f"limit is a number from 1 to {MAX_LIMIT}")
    return int(given)


def as_object(delta: ListedDelta, names: Mapping[Digest, ImageNames]) -> dict[str, Any]:
    """Returns an entry as the API shows it."""
    images = (("src", delta.key.base), ("dest", delta.key.target))
    return {
        "id": delta.id,
        "kind": delta.key.kind,
        "form": delta.key.form.value,
        "src": delta.src,
        "dest": delta.dest,
        "state": delta.state,
        "bytes": delta.bytes,
        "full_bytes": delta.full_bytes,
        "saved": delta.saved,
        "served": delta.served,
        "made": delta.made,
        "used": delta.used,
        "pinned": delta.pinned,
        "reason": delta.reason or None,
        "since": delta.since,
        "names": {part: names[digest].as_json() for part, digest in images if digest in names},
    }
