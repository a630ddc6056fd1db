"""Options that several commands share, and the settings that result from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from obdelta import settings
from obdelta.errors import ObdeltaError
from obdelta.settings import Settings, table

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
FOUND_WANTING: Final = 3
INTERRUPTED: Final = 130

STATUSES: Final = """exit status:
  0  done
  1  it failed; one line on stderr says why
  2  wrong usage, or a setting that cannot be used
  3  done, but what was found is not what was asked for
     (status: the server is not ready; check --require-delta: a full pull; \
verify: something is damaged;
     prepare: a delta above --fail-above, or none to be had)
  130  interrupted by Ctrl-C
  143  ended by SIGTERM"""

_SETTING: Final = "X"

Run = Callable[[argparse.Namespace], int]


class WrongUsage(ObdeltaError):
    """The command line contradicts itself, or an option's value cannot be used."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the settings, some fifty options, out of the usage line. They have a section of their
    own.
    """

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        super().add_usage(
            usage, [action for action in actions if action.metavar != _SETTING], groups, prefix
        )


class Commands:
    """The subcommands of a parser. Each module of commands has a function ``add_to(commands)``."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._made: Any = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def add(
        self, name: str, run: Run, summary: str, about: str = "", examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        """Adds a command. ``summary`` is its line in the list, ``about`` is the rest of the help
        text, ``examples`` are shell lines.
        """
        shown = "\n".join(f"  {example}" for example in examples)
        parser: argparse.ArgumentParser = self._made.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{about}".strip(),
            epilog=(f"examples:\n{shown}\n\n" if examples else "") + STATUSES,
            formatter_class=_Formatter,
        )
        parser.set_defaults(run=run)
        return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of text (docs/commands.md)",
    )


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Adds ``SRC`` and ``DEST``."""
    parser.add_argument(
        "source", metavar="SRC", help="the image that devices run: repository[:tag][@digest]"
    )
    parser.add_argument("target", metavar="DEST", help="the image that they shall run")


def secret_in(text: str, option: str) -> str:
    """Returns the content of the file for ``@FILE``. Other users can read the command line. Raises
    WrongUsage.
    """
    if not text.startswith("@"):
        raise WrongUsage(
            f"{option} names a file, @FILE: a command line is seen by everybody on the machine"
        )
    try:
        return Path(text[1:]).read_text("ascii").strip()
    except UnicodeDecodeError as error:
        raise WrongUsage(f"{option}: {text[1:]} holds more than ASCII") from error


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="the settings file (tap.conf)")


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``-c FILE`` and every setting that is no secret, as other users can read the command
    line.
    """
    add_config(parser)
    group = parser.add_argument_group("settings")
    for row in table():
        if not row.secret:
            help_ = row.help.replace("%", "%%")
            group.add_argument(f"--{row.key}", metavar=_SETTING, help=help_)


def read_settings(
    parsed: argparse.Namespace, fallbacks: Mapping[str, str] | None = None
) -> Settings:
    """Returns the effective settings from options, environment and file. ``fallbacks`` are the
    weakest values. Raises SettingsError.
    """
    options = {row.key: getattr(parsed, row.field, None) for row in table() if not row.secret}
    file = parsed.config or os.environ.get("OBDELTA_CONFIG")
    return settings.read(options, os.environ, Path(file) if file else None, fallbacks=fallbacks)
