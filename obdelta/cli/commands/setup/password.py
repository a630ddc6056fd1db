"""``obdelta password``: prints a line for the file that ``operator-passwords`` names."""

from __future__ import annotations

import argparse
import getpass
import sys

from obdelta.cli.options import OK, Commands, WrongUsage, read_secret


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "password",
        run,
        "print a user's line for the file of operator-passwords",
        "Asks for the password twice on a terminal, else reads one line from standard input.\n"
        "The line contains only a hash (scrypt).",
        ["obdelta password alice >>/etc/obdelta/operators"],
    )
    parser.add_argument("name", metavar="NAME", help="the user: letters, digits and ._@-")
    parser.add_argument("--password", metavar="@FILE", help="a file with the password")


def run(parsed: argparse.Namespace) -> int:
    """Prints the line."""
    from obdelta.web.operators.passwords import make_line

    password = _password(parsed)
    if not password:
        raise WrongUsage("the password is empty")
    try:
        print(make_line(parsed.name, password))
    except ValueError as error:
        raise WrongUsage(f"NAME has the value {parsed.name!a}: {error}") from error
    return OK


def _password(parsed: argparse.Namespace) -> str:
    if parsed.password is not None:
        return read_secret(parsed.password, "--password")
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise WrongUsage("the two passwords differ")
    return password
