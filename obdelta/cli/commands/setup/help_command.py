"""``obdelta help``: the help of a command, or the list of commands."""

from __future__ import annotations

import argparse

from obdelta.cli.options import OK, STATUSES, Commands


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "help",
        run,
        "describe a command, or list the commands",
        "`obdelta help status` also describes exit statuses.",
        ["obdelta help", "obdelta help explain"],
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help="the command")


def run(parsed: argparse.Namespace) -> int:
    """Prints the help."""
    from obdelta.cli.main import make_parser

    parser = make_parser()
    if parsed.command is None:
        parser.print_help()
        return OK
    commands = parser.commands()
    parser._check_value(commands, parsed.command)
    commands.choices[parsed.command].print_help()
    if parsed.command == "status":
        print(f"\n{STATUSES}")
    return OK
