"""Signal handlers: an orderly stop, a reload, or nothing. No signal ends the process without a
drain.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger

log = Logger()

WITHOUT_MEANING = (
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
)
"""Signals that would end a process without a handler. Where the log is a file, SIGUSR1 rotates it
(obdelta/tap.py).
"""


RELOAD_INTERVAL = 1.0
"""Seconds between two reloads at least."""


class ReloadRequests:
    """Calls ``reload`` after signals, at most once in :data:`RELOAD_INTERVAL`.

    Signals that arrive before a reload begins share it. A signal that arrives later, also during
    the reload, leads to another one.
    """

    def __init__(self, reactor: Any, reload: Callable[[], object]) -> None:
        self._reactor, self._reload = reactor, reload
        self._pending = False
        self._earliest = -math.inf

    def request(self) -> None:
        """Asks for a reload. A signal handler may call it."""
        if not self._pending:
            self._pending = True
            self._reactor.callFromThread(self._schedule)

    def _schedule(self) -> None:
        delay = max(0.0, self._earliest - self._reactor.seconds())
        self._reactor.callLater(delay, self._run)

    def _run(self) -> None:
        self._pending = False
        self._earliest = self._reactor.seconds() + RELOAD_INTERVAL
        self._reload()


def handle_signals(reactor: Any, reload: Callable[[], object]) -> None:
    """Installs handlers for SIGHUP, for SIGQUIT, and for the signals without a meaning.

    They run on the reactor thread. SIG_IGN is not used, as child processes would inherit it.
    """

    def meaningless(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        reactor.callFromThread(log.warn, "{name} was ignored: it has no meaning here", name=name)

    for number in WITHOUT_MEANING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, meaningless)
    reloads = ReloadRequests(reactor, reload)
    signal.signal(signal.SIGHUP, lambda *_: reloads.request())
    signal.signal(signal.SIGQUIT, lambda *_: reactor.callFromThread(stop, reactor))


def stop_on_sigterm(reactor: Any) -> None:
    """Installs an orderly stop at SIGTERM, with exit status 0. Call it when the reactor runs.

    It replaces Twisted's own handler, which ends the process by the signal.
    """
    signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(stop, reactor))


def stop(reactor: Any) -> None:
    """Stops the reactor. A second call does nothing."""
    with suppress(ReactorNotRunning):
        reactor.stop()
