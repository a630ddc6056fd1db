"""``POST /api/v1/reload``: reads settings, certificates and keys again, as SIGHUP does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.logger import Logger

from obdelta.errors import BadRequest
from obdelta.web.operators.routes import Answer, Call, Routes, as_json

log = Logger()


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
