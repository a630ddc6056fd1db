"""Options that several commands share, and the settings that result from them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from obdelta import settings
from obdelta.cli import terminal
from obdelta.cli.parser import SettingOption, SettingsHelp, WrongUsage, help_of, metavar_of
from obdelta.oci import Form
from obdelta.settings import Settings, old_keys, table

__all__ = ["WrongUsage"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNSATISFIED: Final = 3
INTERRUPTED: Final = 130

STATUSES: Final = """exit status:
  0  success
  1  failure; one line on stderr gives the reason
  2  wrong usage, or an unusable setting
  3  success, but with a negative result:
     status: the server is not ready; check --require-delta: the answer is a full pull;
     verify: a file or delta is damaged; prepare: a delta is above --fail-above or unavailable;
     reload: a restart is needed
  130  interrupted by Ctrl-C
  143  ended by SIGTERM"""

Run = Callable[[argparse.Namespace], int]


class Commands:
    """The subcommands of a parser. Each module of commands has a function ``add_to(commands)``."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers: Any = parser.add_subparsers(
            metavar="COMMAND", required=True, title="commands"
        )

    def add(
        self, name: str, run: Run, summary: str, about: str = "", examples: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        """Adds a command. ``summary`` is its line in the list, ``about`` is the rest of the help
        text, ``examples`` are shell lines.
        """
        shown = "\n".join(f"  {example}" for example in examples)
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{about}".strip(),
            epilog=f"examples:\n{shown}" if examples else None,
        )
        volume = parser.add_mutually_exclusive_group()
        volume.add_argument(
            "-q", "--quiet", action="store_true", help="print no progress and no notices"
        )
        volume.add_argument(
            "-v", "--verbose", action="store_true", help="print each step, and causes of errors"
        )
        parser.set_defaults(run=run, parser=parser)
        return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of text",
    )


def add_pair(parser: argparse.ArgumentParser, *, or_id: bool = False) -> None:
    """Adds ``SRC`` and ``DEST``. ``or_id``: the ID of a delta may take the place of both."""
    image = "the device's image, NAME[:TAG][@DIGEST]"
    parser.add_argument(
        "source", metavar="SRC", help=f"{image}; or an ID, alone" if or_id else image
    )
    parser.add_argument(
        "target",
        metavar="DEST",
        help="the image to update them to",
        nargs="?" if or_id else None,
    )


_READERS = "; ".join(f"{form.value}: {form.traits.readers}" for form in Form)


def add_form(parser: argparse.ArgumentParser, meaning: str = _READERS) -> None:
    """Adds ``--form``."""
    parser.add_argument("--form", choices=[form.value for form in Form], help=meaning)


def read_secret(text: str, option: str) -> str:
    """Returns the content of the file for ``@FILE``, and of standard input for ``-``. Other users
    can read the command line. Raises WrongUsage.
    """
    if text == "-":
        return sys.stdin.readline().strip()
    if not text.startswith("@"):
        raise WrongUsage(
            f"{option} must name a file, @FILE, or be - for standard input: other users can read"
            " the command line"
        )
    try:
        return Path(text[1:]).read_text("ascii").strip()
    except UnicodeDecodeError as error:
        raise WrongUsage(f"{option}: {text[1:]} is not ASCII") from error
    except OSError as error:
        raise WrongUsage(f"{option}: {text[1:]} cannot be read: {error.strerror}") from error


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="settings (./tap.conf, /etc/obdelta/tap.conf)",
    )


def add_operator(parser: argparse.ArgumentParser, *, config: bool = True) -> None:
    """Adds ``--operator``, and ``-c`` for commands that do not take all settings anyway."""
    parser.add_argument(
        "--operator",
        metavar="URL",
        help="http://HOST:PORT or unix:PATH (default: as settings say)",
    )
    parser.add_argument(
        "--login",
        metavar="@FILE",
        help="a file with USER:PASSWORD; - is stdin",
    )
    if config:
        add_config(parser)


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``-c FILE`` and every setting that is no secret, as other users can read the command
    line.
    """
    add_config(parser)
    parser.add_argument(
        "--help-settings",
        action=SettingsHelp,
        help="list the settings, which are options too",
    )
    for row in table():
        if not row.secret:
            parser.add_argument(
                f"--{row.key}", action=SettingOption, metavar=metavar_of(row), help=help_of(row)
            )
    for key in old_keys():
        parser.add_argument(f"--{key}", action=SettingOption, help=argparse.SUPPRESS)


def given_settings(parsed: argparse.Namespace) -> dict[str, str]:
    """Returns the settings of the command line, by key."""
    keys = [*(row.key for row in table() if not row.secret), *old_keys()]
    options = {key: getattr(parsed, key.replace("-", "_"), None) for key in keys}
    return {key: value for key, value in options.items() if value is not None}


def read_settings(
    parsed: argparse.Namespace, fallbacks: Mapping[str, str] | None = None
) -> Settings:
    """Returns the effective settings from options, environment and file. ``fallbacks`` are the
    weakest values. Prints a line on stderr for each old key. Raises SettingsError.
    """
    file = settings.find_file(parsed.config, os.environ)
    found = settings.read(given_settings(parsed), os.environ, file, fallbacks=fallbacks)
    for line in found.notices:
        terminal.notice(line)
    return found
