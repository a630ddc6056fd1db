"""``obdelta prune``: a running server removes deltas that no device can ask for any more."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from obdelta.cli.options import FAILED, OK, Commands, add_json, add_operator
from obdelta.cli.tables import printable, table

MAX_PROBLEMS = 10
"""Repositories that are printed which the registry did not let be pruned."""
SECONDS = 3600.0
"""Seconds for a whole run: the registry is asked about every image."""


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "prune",
        run,
        "remove deltas that no device can ask for any more",
        "Asks openBalena's API (setting api-url) which releases exist and what devices have. Prints"
        " the deltas in the store\n"
        "and in the registry that no device can ask for, and with --apply removes them.\n"
        "Deltas of images that the API does not know stay. If a repository of the registry fails,"
        " the others\n"
        "are pruned anyway, and the command exits with 1.",
        ["obdelta prune", "obdelta prune --apply"],
    )
    parser.add_argument("--apply", action="store_true", help="remove them; otherwise only print")
    add_operator(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Prints the deltas that would be removed, or that were removed."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed, timeout=SECONDS)
    done = server.post("/api/v1/prune", {"apply": parsed.apply})
    with server.parsing("what was pruned"):
        print(json.dumps(done) if parsed.json else as_text(done))
        return OK if done["problem"] is None else FAILED


def as_text(done: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    rows = [
        ["store", printable(one["src"]), printable(one["dest"]), printable(one["reason"])]
        for one in done["store"]
    ]
    rows += [
        [
            "registry",
            printable(" ".join(one["tags"])),
            printable(one["repository"]),
            printable(one["reason"]),
        ]
        for one in done["registry"]
    ]
    lines = [table(["where", "base", "target", "reason"], rows)] if rows else []
    verb = "removed" if done["applied"] else "to remove (--apply does it)"
    lines.append(
        f"{len(done['store'])} of the store, {len(done['registry'])} of the registry {verb}"
    )
    if done["applied"]:
        lines.append(f"freed: {done['freed']:,} bytes")
    lines += [f"kept: {count} ({printable(why)})" for why, count in sorted(done["kept"].items())]
    problems = done["problems"]
    if problems:
        lines.append(f"{len(problems)} repositories of the registry failed:")
    lines += [
        f"  {printable(one['repository'])}: {printable(one['reason'])}"
        for one in problems[:MAX_PROBLEMS]
    ]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  and {len(problems) - MAX_PROBLEMS} more (--json lists all)")
    return "\n".join(lines)
