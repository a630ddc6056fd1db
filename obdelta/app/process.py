"""The server's process: its signal handlers, and its limit of open files.

A signal stops it in order, reloads, or does nothing. No signal ends the process without a drain.
"""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import Unavailable

log = Logger()

IGNORED_SIGNALS = (
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

FAILED = 1
UNUSABLE = 2
"""Exit statuses of a server that does not start: 2 for unusable settings, as of commands."""
MIN_OPEN_FILES = 256
"""Open files that the server needs to start. With fewer, builds would fail at random."""
FILES_PER_BUILD = 64
"""Open files that one build may need, with its downloads, worker processes and pipes."""
RELOAD_INTERVAL = 1.0
"""Seconds between two reloads at least."""


class ReloadRequests:
    """Calls ``reload`` after signals, at most once in :data:`RELOAD_INTERVAL`.

    Signals that arrive before a reload begins share it. A signal that arrives later, also during
    the reload, leads to another one.
    """

    def __init__(self, reactor: IReactor, reload: Callable[[], object]) -> None:
        self._reactor, self._reload = reactor, reload
        self._pending = False
        self._earliest = -math.inf

    def request(self) -> None:
        """Requests a reload. A signal handler may call it."""
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


def handle_signals(reactor: IReactor, reload: Callable[[], object]) -> None:
    """Installs handlers for SIGHUP, for SIGQUIT, and for the signals without a meaning.

    They run on the reactor thread. SIG_IGN is not used, as child processes would inherit it.
    """

    def log_ignored(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        reactor.callFromThread(log.warn, "{name} was ignored: it has no meaning here", name=name)

    for number in IGNORED_SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, log_ignored)
    reloads = ReloadRequests(reactor, reload)
    signal.signal(signal.SIGHUP, lambda *_: reloads.request())
    signal.signal(signal.SIGQUIT, lambda *_: reactor.callFromThread(stop, reactor))


def stop_on_sigterm(reactor: IReactor) -> None:
    """Installs an orderly stop at SIGTERM, with exit status 0. Call it when the reactor runs.

    It replaces Twisted's own handler, which ends the process by the signal.
    """
    signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(stop, reactor))


def stop(reactor: IReactor) -> None:
    """Stops the reactor. A second call does nothing."""
    with suppress(ReactorNotRunning):
        reactor.stop()


def raise_open_files(max_builds: int) -> None:
    """Raises the soft limit to the hard one, as every waiting device is an open connection.

    Raises Unavailable if the hard limit is too low for any build, and warns if it is too low
    for ``max_builds``.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return
    wanted = MIN_OPEN_FILES + FILES_PER_BUILD * max_builds
    if most < MIN_OPEN_FILES:
        raise Unavailable(
            f"the limit of open files is {most}: at least {MIN_OPEN_FILES} are needed, and "
            f"{wanted} plus one for each device recommended: raise it (LimitNOFILE= of "
            "systemd, --ulimit nofile= of Docker, ulimit -Hn)"
        )
    if most < wanted:
        log.warn(
            "the limit of open files is {most}: {builds} builds may need {wanted}, and each device"
            " one more: raise it, or lower max-builds",
            most=most,
            builds=max_builds,
            wanted=wanted,
        )
