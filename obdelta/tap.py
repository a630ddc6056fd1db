"""The ``twistd obdelta`` plugin: its command-line options, and its service."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, NoReturn, cast

from twisted.application.service import IService
from twisted.internet import reactor as installed_reactor
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.logfile import LogFile

from obdelta import __version__, settings
from obdelta.app.access import make_access
from obdelta.app.process import UNUSABLE
from obdelta.app.server import Server
from obdelta.app.settings_reload import Reload
from obdelta.app.worker_server import WorkerServer
from obdelta.concurrency.reactor import IReactor, use_monotonic_time
from obdelta.errors import SettingsError
from obdelta.observability.logging import Levels, observer

log = Logger()


class Options(usage.Options):
    """Command-line options: each setting has a long option of its name (``docs/settings.md``)."""

    synopsis = "[options]"
    longdesc = "Delta updates for openBalena devices: a streaming proxy before the registry."
    optFlags = [  # noqa: RUF012 - Twisted reads it as a plain class attribute
        ["worker", None, "build for other servers (builds = workers), and serve no device"],
    ]
    optParameters = [  # noqa: RUF012 - Twisted reads it as a plain class attribute
        [
            "config",
            "c",
            None,
            "the settings file (OBDELTA_CONFIG, tap.conf, /etc/obdelta/tap.conf)",
        ],
        *([row.key, None, None, row.help] for row in settings.table() if not row.secret),
        *([key, None, None, None] for key in settings.old_keys()),
    ]

    def getUsage(self, width: int | None = None) -> str:
        """Returns the help text, without old keys that still work."""
        old = {f"{key}=" for key in settings.old_keys()}
        options, self.longOpt = self.longOpt, [name for name in self.longOpt if name not in old]
        try:
            return super().getUsage(width)
        finally:
            self.longOpt = options

    def opt_version(self) -> None:
        """Print obdelta's version and exit."""
        sys.stdout.write(f"obdelta {__version__}\n")
        raise SystemExit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parses the command line. Wrong usage is one line on stderr and status 2, as with the
        ``obdelta`` command; twistd would print its whole help.
        """
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call] # Twisted's
        except usage.UsageError as error:
            _refuse([f"{error}: see twistd obdelta --help"])

    def postOptions(self) -> None:
        """Reads the settings. Where they are unusable, prints a line for each error on stderr and
        exits with status 2.
        """
        given = {key: value for key, value in self.items() if key not in ("config", "worker")}
        environment = dict(os.environ)
        try:
            file = settings.find_file(self["config"], environment)
            # twistd changes its directory, and a reload reads the same file.
            file = file.absolute() if file is not None else None
            self.settings = settings.read(given, environment, file)
            if not self["worker"]:
                make_access(self.settings)
        except SettingsError as error:
            _refuse(error.each)
        self.sources = (given, environment, file)


def _refuse(reasons: Iterable[object]) -> NoReturn:
    for reason in reasons:
        print(f"obdelta: {reason}", file=sys.stderr)
    raise SystemExit(UNUSABLE)


def makeService(options: Options) -> IService:
    """Returns the service; twistd calls this."""
    reactor = cast(IReactor, installed_reactor)
    for notice in options.settings.notices:
        log.warn("{notice}", notice=notice)
    use_monotonic_time(reactor)
    # Children inherit the environment unless another one is given. The settings already hold the
    # secrets.
    for name in (name for row in settings.all_rows() if row.secret for name in row.environment):
        os.environ.pop(name, None)
    levels = Levels(options.settings.log_level)
    reload = Reload(options.settings, lambda: settings.read(*options.sources), levels)
    made = WorkerServer if options["worker"] else Server
    return made(
        options.settings,
        reactor,
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
        reload.steps.append(lambda _levels, _report: log.reopen())
        signal.signal(signal.SIGUSR1, lambda *_: installed_reactor.callFromThread(out.rotate))  # type: ignore[attr-defined]
    return observer(options.settings.log_format, levels, out)
