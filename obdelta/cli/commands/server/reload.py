"""``obdelta reload``: a running server reads settings, certificates and keys again."""

from __future__ import annotations

import argparse
import json

from obdelta.cli.options import FAILED, OK, UNSATISFIED, Commands, add_json, add_operator
from obdelta.cli.tables import printable


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "reload",
        run,
        "make a running server read settings, certificates and keys again",
        "Certificates, keys and log-level take effect at once. Exits with 3 if other settings"
        " changed, which\nneed a restart, and with 1 if something is unusable; the old content then"
        " stays in force.",
        ["obdelta reload"],
    )
    add_operator(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Reloads, and prints the changes."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    answer = server.post("/api/v1/reload", {})
    with server.parsing("a reload"):
        lists = [
            ("taken", answer["taken"]),
            ("needs a restart", answer["restart"]),
            ("unusable", answer["problems"]),
        ]
        text = "\n".join(f"{name}: {printable(line)}" for name, lines in lists for line in lines)
    print(json.dumps(answer) if parsed.json else text or "nothing has changed")
    return FAILED if answer["problems"] else UNSATISFIED if answer["restart"] else OK
