"""``obdelta completion``: a shell's completion script, made by shtab from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from obdelta.cli.options import OK, Commands

SHELLS = ("bash", "zsh", "fish")
_FILES = frozenset({"FILE", "OUT", "BASE_TAR", "TARGET_TAR", "DELTA"})
_FOLDERS = frozenset({"DIR"})


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "completion",
        run,
        "print a completion script for a shell",
        "The script needs no Python when it completes. Print it again after an upgrade.",
        [
            "obdelta completion bash >/etc/bash_completion.d/obdelta",
            "obdelta completion zsh >/usr/local/share/zsh/site-functions/_obdelta",
            "obdelta completion fish >~/.config/fish/completions/obdelta.fish",
        ],
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(parsed: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    from obdelta.cli.main import make_parser

    parser = make_parser()
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # shtab reads this attribute
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, parsed.shell))
    return OK


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # no public access; shtab does the same
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
