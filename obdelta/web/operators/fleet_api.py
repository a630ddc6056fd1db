"""``/api/v1/fleet``: releases that are prepared; ``/api/v1/fleet/poll`` looks for new ones now."""

from __future__ import annotations

from typing import Any

from obdelta.fleet.watcher import PreparedRelease, ReleaseWatcher
from obdelta.web.operators.routes import Answer, Call, NotFound, Routes, as_json


class FleetApi:
    """Serves ``/api/v1/fleet``. ``watcher`` is None without the setting ``api-url``."""

    def __init__(self, watcher: ReleaseWatcher | None) -> None:
        self._watcher = watcher

    def add_to(self, routes: Routes) -> None:
        routes.add("GET", "/api/v1/fleet", self.state)
        routes.add("POST", "/api/v1/fleet/poll", self.poll)

    async def state(self, call: Call) -> Answer:
        """Returns what was prepared, the newest release first."""
        return as_json(self._state())

    async def poll(self, call: Call) -> Answer:
        """Looks for new releases now, for webhooks and programs that know of one."""
        call.json()  # Each sender of webhooks has a body of its own; only its type matters.
        self._known().poll()
        return as_json(self._state(), 202)

    def _known(self) -> ReleaseWatcher:
        if self._watcher is None:
            raise NotFound("releases are not watched: set api-url")
        return self._watcher

    def _state(self) -> dict[str, Any]:
        watcher = self._known()
        return {
            "problem": watcher.problem,
            "polled": watcher.polled or None,
            "releases": [_release(entry) for entry in reversed(watcher.releases.values())],
        }


def _release(entry: PreparedRelease) -> dict[str, Any]:
    release = entry.release
    return {
        "id": release.id,
        "fleet": release.fleet,
        "version": release.version,
        "commit": release.commit,
        "finalized": release.finalized,
        "state": entry.state,
        "problem": entry.problem,
        "bases": entry.bases,
        "devices": entry.devices,
        "deltas": entry.counts(),
        "list": entry.list_id,
        "seen": entry.seen,
        "ended": entry.ended,
    }
