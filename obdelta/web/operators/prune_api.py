"""``POST /api/v1/prune``: says which deltas no device can ask for, or removes them."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from obdelta.errors import BadRequest
from obdelta.fleet.pruner import Pruned, Pruner
from obdelta.store.catalogue.listed_deltas import id_of_key
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json

log = Logger()


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
