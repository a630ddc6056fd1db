"""What signals do: a stop in order, a reload, or nothing. None ends the process without a drain."""

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
"""They end a process that has no function for them. Where the log is a file, SIGUSR1 rotates it
(obdelta/tap.py).
"""


def handle_signals(reactor: Any, reload: Callable[[], object]) -> None:
    """Installs functions for SIGHUP, for SIGQUIT, and for the signals without a meaning.

    They run on the reactor thread. Functions are used instead of SIG_IGN, which child processes
    would inherit.
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
    """SIGTERM stops in order, with exit status 0. Call it when the reactor runs.

    Twisted's own function, which a running reactor has installed, ends the process by the signal.
    """
    signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(stop, reactor))


def stop(reactor: Any) -> None:
    """Stops the reactor; a second call does nothing."""
    with suppress(ReactorNotRunning):
        reactor.stop()
