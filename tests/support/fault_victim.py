"""A program that forks servers which are to be killed.

One request a line on stdin, JSON: ``options`` (settings), ``log`` (a path), ``kill``:
``["operation", n]`` (at the n-th file operation), ``["change", n]`` (at the n-th step that a build
or a push takes) or ``["never", 0]``; both count from SIGUSR1 on. Each is answered with the child's
process id, then with ``stage NAME`` whenever a build gets on, and with ``ended STATUS``. What the
child runs is the server of ``twistd obdelta``; forking it from a process that has imported all of
it already is what makes hundreds of starts affordable.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

# All but the reactor, which no two processes may share.
import obdelta.settings
from obdelta.app import builders
from obdelta.app.server import Server
from obdelta.builds.service import DeltaService, RunningBuild
from obdelta.registry.upload import Pushed, Pusher
from tests.support.store_crash import kill_at


def _tell(text: str) -> None:
    os.write(1, f"{text}\n".encode("ascii"))


class _Steps:
    """A coordinator's watcher: tells the stage of a build, and ends the process at one of its
    steps.
    """

    def __init__(self) -> None:
        self.left = 0
        self._told = ""

    def asked(self, kind: str, found: str) -> None:
        """Nothing."""

    def changed(self, build: RunningBuild) -> None:
        """A step."""
        self._step(
            str(build.progress.get("stage", "queued" if build.started is None else "started"))
        )

    def ended(self, build: RunningBuild, outcome: object, seconds: float) -> None:
        """The last step of a build."""
        self._step("published")

    async def pushed(
        self, push: Callable[..., Awaitable[Pushed]], *arguments: Any, **options: Any
    ) -> Pushed:
        """The steps of a push: each blob, and its end."""
        self._step("push")
        done = await push(*arguments, **options, progress=lambda _: self._step("push"))
        self._step("pushed")
        return done

    def _step(self, stage: str) -> None:
        if stage != self._told:
            self._told = stage
            _tell(f"stage {stage}")
        if self.left:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def _child(request: dict[str, Any]) -> None:
    from twisted.internet import reactor
    from twisted.logger import globalLogBeginner, textFileLogObserver

    log = io.open(request["log"], "a", encoding="utf-8")  # noqa: SIM115, UP020 - for the life of the process
    globalLogBeginner.beginLoggingTo([textFileLogObserver(log)], redirectStandardIO=False)
    steps = _Steps()
    made = DeltaService.__init__

    def watched(self: DeltaService, **arguments: Any) -> None:
        made(self, **arguments)
        self.watchers.append(steps)

    DeltaService.__init__ = watched  # type: ignore[method-assign]
    builders.MOST_READY = (
        1  # a worker costs more than all else that a victim does in its short life
    )
    push = Pusher.push
    Pusher.push = lambda *arguments, **options: steps.pushed(push, *arguments, **options)  # type: ignore[method-assign]
    server = Server(obdelta.settings.read(request["options"], {}, None), reactor)
    kind, at = request["kill"]

    def arm(*_: object) -> None:
        if kind == "operation":
            kill_at(at)
        elif kind == "change":
            steps.left = at
        _tell("armed")

    signal.signal(signal.SIGUSR1, arm)
    server.startService()
    reactor.addSystemEventTrigger("before", "shutdown", server.stopService)
    reactor.run()


def main() -> None:
    """Serves until stdin ends."""
    zombie = 0
    for line in sys.stdin:
        if zombie:
            os.waitpid(zombie, 0)
        child = os.fork()
        if not child:
            _child(json.loads(line))
            os._exit(0)
        _tell(f"pid {child}")
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert end is not None
        _tell(f"ended {end.si_status if end.si_code == os.CLD_EXITED else -end.si_status}")
        # Until somebody asks for the next, its number is nobody else's.
        zombie = child


if __name__ == "__main__":
    main()
