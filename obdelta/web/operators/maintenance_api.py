"""API of maintenance: ``/api/v1/gc`` frees space, ``/api/v1/prune`` removes deltas that no device
can ask for, and ``/api/v1/reload`` reads settings again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.logger import Logger

from obdelta.errors import BadRequest
from obdelta.fleet.pruner import Pruned, Pruner
from obdelta.store.catalogue.listed_deltas import id_of_key
from obdelta.store.quota import Reclaimed
from obdelta.store.quota_service import QuotaService
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json

log = Logger()


class GcApi:
    """Serves ``/api/v1/gc``. ``quota`` is the reported quota in bytes."""

    def __init__(self, service: QuotaService, quota: int) -> None:
        self._service, self._quota = service, quota

    def add_to(self, routes: Routes) -> None:
        routes.add("POST", "/api/v1/gc", self.collect)

    async def collect(self, call: Call) -> Answer:
        """Accepts ``{"free": BYTES}`` or ``{}``. Returns the bytes freed and the current usage."""
        body = call.json()
        free = body.pop("free", 0)
        if body or not isinstance(free, int) or isinstance(free, bool) or not 0 <= free < 1 << 62:
            raise BadRequest('the body is {"free": BYTES}, or {}')
        done = await self._service.collect(free)
        log.info(
            "operator action: user={user} action=gc free={free} freed={freed}",
            user=call.user,
            free=free,
            freed=done.freed,
        )
        return as_json(collected_as_json(done, self._quota))


def collected_as_json(done: Reclaimed, quota: int) -> dict[str, Any]:
    """Returns the result of a collection, sizes in bytes."""
    return {"freed": done.freed, "usage": dict(done.usage), "quota": quota, "over": done.over}


class PruneApi:
    """Serves ``/api/v1/prune``. ``pruner`` is None without the setting ``api-url``."""

    def __init__(self, pruner: Pruner | None) -> None:
        self._pruner = pruner

    def add_to(self, routes: Routes) -> None:
        routes.add("POST", "/api/v1/prune", self.prune)

    async def prune(self, call: Call) -> Answer:
        """Accepts ``{"apply": true}``, or ``{}`` for a dry run."""
        body = call.json()
        apply = body.pop("apply", False)
        if body or not isinstance(apply, bool):
            raise BadRequest('the body is {"apply": true}, or {}')
        if self._pruner is None:
            raise NotFound("what devices have is not known: set api-url")
        done = await self._pruner.prune(apply)
        if apply:
            log.info("operator action: user={user} action=prune", user=call.user)
        return as_json(_pruned(done))


def _pruned(done: Pruned) -> dict[str, Any]:
    return {
        "applied": done.applied,
        "freed": done.freed,
        "problem": done.problem,
        "problems": [{"repository": one.repository, "reason": one.reason} for one in done.problems],
        "store": [
            {
                "id": id_of_key(one.key),
                "src": one.base_repository,
                "dest": one.target_repository,
                "bytes": one.bytes,
                "reason": one.reason.value,
            }
            for one in done.stored
        ],
        "registry": [
            {
                "repository": one.repository,
                "digest": str(one.digest),
                "tags": list(one.tags),
                "reason": one.reason.value,
            }
            for one in done.registry
        ],
        "kept": dict(done.kept),
    }


class Report(Protocol):
    """The result of a reload: one line for each change, and for each file that cannot be used."""

    taken: list[str]
    restart: list[str]
    problems: list[str]


class ReloadApi:
    """Serves ``/api/v1/reload``."""

    def __init__(self, reload: Callable[[], Report]) -> None:
        self._reload = reload

    def add_to(self, routes: Routes) -> None:
        routes.add("POST", "/api/v1/reload", self.reload)

    async def reload(self, call: Call) -> Answer:
        """Accepts ``{}``. Returns what was taken, what needs a restart, and what is unusable."""
        if call.json():
            raise BadRequest("the body is {}")
        log.info("operator action: user={user} action=reload", user=call.user)
        done = self._reload()
        return as_json({"taken": done.taken, "restart": done.restart, "problems": done.problems})
