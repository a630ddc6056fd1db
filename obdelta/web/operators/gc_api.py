"""``POST /api/v1/gc``: enforces the quota now, or frees a number of bytes."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from obdelta.errors import BadRequest
from obdelta.store.quota import Reclaimed
from obdelta.store.quota_service import QuotaService
from obdelta.web.operators.routes import Answer, Call, Routes, as_json

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
