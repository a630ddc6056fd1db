"""Signals that the server's child processes ignore."""

from __future__ import annotations

import signal


def ignore_stray_signals() -> None:
    """Ignores the signals that concern the server alone and that may be sent to all of its
    processes (``systemctl kill``).

    They would end the process, and with it a build.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
