"""``obdelta settings``: the effective settings, and the source of each value."""

from __future__ import annotations

import argparse
import json

from obdelta.cli.options import OK, Commands, add_json, add_setting_options, read_settings
from obdelta.settings import table


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "settings",
        run,
        "print the effective settings and where each came from",
        "The strongest is an option, then the environment, then the file, then what is derived from"
        " other settings, then the\ndefault. What is printed is a settings file that gives the"
        " same; secrets are masked.",
        [
            "obdelta settings -c tap.conf",
            "OBDELTA_HOLD=30 obdelta settings -c tap.conf --effort small",
        ],
    )
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    found = read_settings(parsed)
    if parsed.json:
        rows = {
            row.key: {"value": found.texts.get(row.key), "origin": found.origins[row.key]}
            for row in table()
        }
        print(json.dumps({"settings": rows}))
        return OK
    print("[obdelta]")
    for row in table():
        origin = found.origins[row.key]
        if row.key in found.texts:
            print(f"# {origin}\n{row.key} = " + "\n    ".join(found.texts[row.key].splitlines()))
        else:
            print(f"# {origin}\n#{row.key} =")
    return OK
