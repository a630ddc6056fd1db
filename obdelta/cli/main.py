"""The ``obdelta`` command: its subcommands, and exit statuses for errors."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from obdelta import __version__
from obdelta.cli import terminal
from obdelta.cli.commands.images import build, check, diff_patch, explain, export, verify
from obdelta.cli.commands.server import (
    deltas,
    gc,
    prepare,
    prune,
    reload,
    serve,
    status,
    trace,
    worker,
)
from obdelta.cli.commands.setup import (
    completion,
    doctor,
    help_command,
    init,
    password,
    settings_command,
    token,
)
from obdelta.cli.options import FAILED, INTERRUPTED, USAGE, Commands, Run
from obdelta.cli.parser import Parser, WrongUsage
from obdelta.cli.tables import printable
from obdelta.errors import ObdeltaError, SettingsError

_MODULES = (
    init,
    doctor,
    serve,
    worker,
    reload,
    status,
    deltas,
    trace,
    token,
    prepare,
    prune,
    explain,
    export,
    verify,
    gc,
    settings_command,
    check,
    build,
    diff_patch,
    password,
    completion,
    help_command,
)
"""In the order of the help text. Modules import what is slow (Twisted, the
kernel) when they run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    # Ends with the usual status instead of by the signal, so that cleanup runs.
    signal.signal(signal.SIGTERM, _once(lambda: sys.exit(128 + signal.SIGTERM)))
    signal.signal(signal.SIGINT, _once(signal.default_int_handler, signal.SIGINT, None))
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Known before the line is parsed, which may be what fails.
    failed = _Failures(as_json="--json" in given)
    try:
        return _run(given)
    except SettingsError as error:
        return [failed.report(each, USAGE) for each in error.each][-1]
    except WrongUsage as error:
        return failed.report(error, USAGE)
    except ObdeltaError as error:
        return failed.report(error, FAILED)
    except BrokenPipeError:
        # The reader of stdout has closed it. A second error when Python flushes it helps no one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        why = f"{error.filename or 'input or output'}: {error.strerror or error}"
        return failed.report(error, FAILED, why)
    except KeyboardInterrupt as error:
        return failed.report(error, INTERRUPTED, "interrupted")


def _once(act: Callable[..., object], *arguments: object) -> Callable[[int, object], None]:
    """Returns a signal handler that acts once. Later signals do not interrupt the cleanup."""

    def handle(_number: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        act(*arguments)

    return handle


def _run(arguments: Sequence[str]) -> int:
    parsed = make_parser().parse_args(arguments)
    terminal.use(
        terminal.Volume.QUIET
        if parsed.quiet
        else terminal.Volume.VERBOSE
        if parsed.verbose
        else terminal.Volume.NORMAL
    )
    run: Run = parsed.run
    status = run(parsed)
    sys.stdout.flush()  # here, where a closed stdout makes no traceback
    return status


class _Failures:
    """Prints why a command failed, on stderr, as a line or as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def report(self, error: BaseException, status: int, why: str | None = None) -> int:
        """Prints one error and returns the exit status."""
        message = _line(error if why is None else why)
        causes = list(_causes(error)) if terminal.verbose() else []
        if self._as_json:
            value = {"type": type(error).__name__, "message": message, "status": status}
            shown = value | ({"causes": causes} if causes else {})
            print(json.dumps({"error": shown}), file=sys.stderr)
        else:
            for line in [message, *(f"  because: {cause}" for cause in causes)]:
                print(f"obdelta: {line}", file=sys.stderr)
        return status


def _line(why: object) -> str:
    return printable(" ".join(str(why).split()))


def _causes(error: BaseException) -> Iterator[str]:
    cause = error.__cause__
    while cause is not None:
        yield _line(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__


def make_parser() -> Parser:
    """Returns the parser of the whole command line."""
    parser = Parser(
        "obdelta",
        description=(
            "Container image deltas for openBalena devices. `obdelta serve` runs the server.\n"
            "Help: `obdelta help COMMAND`. Exit statuses: `obdelta help status`."
        ),
    )
    parser.add_argument("--version", action="version", version=f"obdelta {__version__}")
    commands = Commands(parser)
    for module in _MODULES:
        module.add_to(commands)
    return parser
