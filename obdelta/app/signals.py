"""Signal handlers: an orderly stop, a reload, or nothing. No signal ends the process without a
drain.
"""

from __future__ import annotations

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
    signal.signal(signal.SIGHUP, lambda *_: reactor.callFromThread(reload))
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
