"""The ``twistd obdelta`` plugin: its command-line options, and its service."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from twisted.application.service import IService
from twisted.internet import reactor as installed_reactor
from twisted.logger import ILogObserver
from twisted.python import usage
from twisted.python.logfile import LogFile

from obdelta import __version__, settings
from obdelta.app.factories import make_access
from obdelta.app.reload import Reload
from obdelta.app.server import Server
from obdelta.concurrency.clock import use_monotonic_time
from obdelta.errors import SettingsError
from obdelta.observability.logging import Levels, observer


class Options(usage.Options):
    """Command-line options: each setting has a long option of its name (``docs/settings.md``)."""

    synopsis = "[options]"
    longdesc = "Delta updates for openBalena devices: a streaming proxy before the registry."
    optParameters = [  # noqa: RUF012 - Twisted reads it as a plain class attribute
        ["config", "c", os.environ.get("OBDELTA_CONFIG"), "the settings file (tap.conf)"],
        *([row.key, None, None, row.help] for row in settings.table() if not row.secret),
    ]

    def opt_version(self) -> None:
        """Print obdelta's version and exit."""
        sys.stdout.write(f"obdelta {__version__}\n")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """Reads the settings. Prints one line on stderr and exits with status 1 where they are
        unusable.
        """
        given = {key: value for key, value in self.items() if key != "config"}
        environment = dict(os.environ)

        def read() -> settings.Settings:
            return settings.read(
                given, environment, Path(self["config"]) if self["config"] else None
            )

        self.read = read
        try:
            self.settings = read()
            make_access(self.settings, time.time)
        except SettingsError as error:
            raise SystemExit(f"obdelta: {error}") from error


def makeService(options: Options) -> IService:
    """Returns the service; twistd calls this."""
    use_monotonic_time(installed_reactor)
    # Children inherit the environment unless another one is given. The settings already hold the
    # secrets.
    for name in (name for row in settings.table() if row.secret for name in row.environment):
        os.environ.pop(name, None)
    levels = Levels(options.settings.log_level)
    reload = Reload(options.settings, options.read, levels)
    return Server(
        options.settings,
        installed_reactor,
        make_observer(options, levels, reload),
        reload=reload,
    )


def make_observer(options: Options, levels: Levels, reload: Reload) -> ILogObserver | None:
    """Returns the log observer for the destination in twistd's options. None: they name one of
    their own (``--syslog``, ``--logger``).
    """
    given: Mapping[str, Any] = options.parent or {}
    if given.get("syslog") or given.get("logger"):
        return None
    path, here = given.get("logfile"), given.get("nodaemon", True)
    if path == "-" or (here and not path):
        out: IO[Any] = sys.stdout
    else:
        out = log = LogFile.fromFullPath(path or "twistd.log")
        # For programs that move the file away, and at SIGUSR1, as with twistd's own log.
        reload.steps.append(lambda _: log.reopen())
        signal.signal(signal.SIGUSR1, lambda *_: installed_reactor.callFromThread(out.rotate))  # type: ignore[attr-defined]
    return observer(options.settings.log_format, levels, out)
