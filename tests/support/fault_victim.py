"""A program that forks servers, which the test kills.

Each line on stdin is a request in JSON: ``options`` (settings), ``log`` (a path), ``kill``:
``["operation", n]`` (at the n-th file operation), ``["change", n]`` (at the n-th step of a build
or a push) or ``["never", 0]``. Both count from SIGUSR1 on. The answer is the child's process ID,
then ``stage NAME`` whenever a build reaches a stage, and at last ``ended STATUS``.

The child runs the server of ``twistd obdelta``. It is forked from a process that has imported all
of its modules, which makes hundreds of starts affordable.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, cast

# Everything but the reactor, which no two processes may share.
import obdelta.settings
from obdelta.app import components
from obdelta.app.server import Server
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.service import DeltaService
from obdelta.concurrency.reactor import IReactor
from obdelta.registry.upload import Pusher, PushResult
from tests.support.store_crash import kill_at


def _report(text: str) -> None:
    os.write(1, f"{text}\n".encode("ascii"))


class _Steps:
    """A watcher of builds: reports a build's stage, and ends the process at one of its steps."""

    def __init__(self) -> None:
        self.left = 0
        self._reported = ""

    def requested(self, kind: str, found: str) -> None:
        """Does nothing."""

    def changed(self, build: RunningBuild) -> None:
        """Counts a step."""
        self._step(
            str(build.progress.get("stage", "queued" if build.started is None else "started"))
        )

    def ended(self, build: RunningBuild, outcome: object, seconds: float) -> None:
        """Counts the last step of a build."""
        self._step("published")

    async def pushed(
        self, push: Callable[..., Awaitable[PushResult]], *arguments: Any, **options: Any
    ) -> PushResult:
        """Counts the steps of a push: each blob, and its end."""
        self._step("push")
        done = await push(*arguments, **options, progress=lambda _: self._step("push"))
        self._step("pushed")
        return done

    def _step(self, stage: str) -> None:
        if stage != self._reported:
            self._reported = stage
            _report(f"stage {stage}")
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
    components.MAX_READY = 1  # a worker process would cost more than the rest
    push = Pusher.push
    Pusher.push = lambda *arguments, **options: steps.pushed(push, *arguments, **options)  # type: ignore[method-assign]
    server = Server(obdelta.settings.read(request["options"], {}, None), cast(IReactor, reactor))
    kind, at = request["kill"]

    def arm(*_: object) -> None:
        if kind == "operation":
            kill_at(at)
        elif kind == "change":
            steps.left = at
        _report("armed")

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
        _report(f"pid {child}")
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert end is not None
        _report(f"ended {end.si_status if end.si_code == os.CLD_EXITED else -end.si_status}")
        # It is reaped before the next child starts, so no other process gets its ID.
        zombie = child


if __name__ == "__main__":
    main()
