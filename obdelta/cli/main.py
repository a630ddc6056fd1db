"""The ``obdelta`` command: its subcommands, and exit statuses for errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from obdelta import __version__
from obdelta.cli.commands import (
    build,
    check,
    completion,
    diff_patch,
    explain,
    export,
    gc,
    prepare,
    settings_command,
    status,
    verify,
)
from obdelta.cli.options import FAILED, INTERRUPTED, STATUSES, USAGE, Commands, Run, WrongUsage
from obdelta.cli.tables import printable
from obdelta.errors import ObdeltaError, SettingsError

_MODULES = (
    status,
    prepare,
    explain,
    export,
    verify,
    gc,
    settings_command,
    check,
    build,
    diff_patch,
    completion,
)
"""In the order of the help text. Modules import what is slow (Twisted, the
kernel) when they run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    # Ends with the usual status instead of by the signal, so that cleanup runs.
    signal.signal(signal.SIGTERM, _once(lambda: sys.exit(128 + signal.SIGTERM)))
    signal.signal(signal.SIGINT, _once(signal.default_int_handler, signal.SIGINT, None))
    try:
        return _run(arguments)
    except (SettingsError, WrongUsage) as error:
        return _failed(error, USAGE)
    except ObdeltaError as error:
        return _failed(error, FAILED)
    except BrokenPipeError:
        # The reader of stdout has closed it. A second error when Python flushes it helps no one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _failed(f"{error.filename or 'input or output'}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)


def _once(act: Callable[..., object], *arguments: object) -> Callable[[int, object], None]:
    """Returns a signal handler that acts once. Later signals do not interrupt the cleanup."""

    def caught(_number: int, _frame: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        act(*arguments)

    return caught


def _run(arguments: Sequence[str] | None) -> int:
    parsed = make_parser().parse_args(arguments)
    run: Run = parsed.run
    status = run(parsed)
    sys.stdout.flush()  # here, where a closed stdout makes no traceback
    return status


def _failed(why: object, status: int) -> int:
    print(f"obdelta: {printable(' '.join(str(why).split()))}", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        "obdelta",
        description=(
            "Container image deltas for openBalena devices. The server itself is started with"
            " twistd:\ntwistd -n obdelta --config tap.conf"
        ),
        epilog=(
            "`obdelta COMMAND --help` tells more of each; docs/commands.md shows what they"
            f" print.\n\n{STATUSES}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"obdelta {__version__}")
    commands = Commands(parser)
    for module in _MODULES:
        module.add_to(commands)
    return parser
