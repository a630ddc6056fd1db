"""``obdelta settings``: the effective settings, and the source of each value."""

from __future__ import annotations

import argparse
import json

from obdelta.cli.commands.setup import doctor
from obdelta.cli.options import OK, Commands, add_json, add_setting_options, read_settings
from obdelta.settings import Setting, Settings, all_rows


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "settings",
        run,
        "print the effective settings and the source of each",
        "An option overrides the environment, which overrides the file; then follow "
        "values derived from other settings, and the\n"
        "defaults. The output is a settings file with the same effect; secrets are "
        "masked.",
        [
            "obdelta settings -c tap.conf",
            "OBDELTA_REQUEST_TIMEOUT=30 obdelta settings -c tap.conf --effort small",
        ],
    )
    parser.add_argument(
        "--check", action="store_true", help="check them instead, as `obdelta doctor` does"
    )
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    if parsed.check:
        return doctor.run(parsed)
    found = read_settings(parsed)
    if parsed.json:
        rows = {
            row.key: {"value": found.texts.get(row.key), "origin": found.origins[row.key]}
            for row in rows_of(found)
        }
        print(json.dumps({"settings": rows}))
        return OK
    print("[obdelta]")
    for row in rows_of(found):
        origin = found.origins[row.key]
        if row.key in found.texts:
            print(f"# {origin}\n{row.key} = " + "\n    ".join(found.texts[row.key].splitlines()))
        else:
            print(f"# {origin}\n#{row.key} =")
    return OK


def rows_of(found: Settings) -> list[Setting]:
    """Returns the documented settings, and superseded ones that were given."""
    unset = ("default", "derived")
    return [row for row in all_rows() if not row.superseded or found.origins[row.key] not in unset]
