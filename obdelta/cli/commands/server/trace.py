"""``obdelta trace``: the last requests of a device, and why they were refused."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from obdelta.cli.options import OK, Commands, add_json, add_operator
from obdelta.cli.tables import ago, fields, size, table

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{12})[0-9a-f]{52}", re.ASCII)


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "trace",
        run,
        "show the last requests of a device, and why they were refused",
        "Without a name, lists the clients whose requests were refused. A running server remembers"
        " the last requests.",
        ["obdelta trace", "obdelta trace 9f86d081884c7d65", "obdelta trace 203.0.113.7 --json"],
    )
    parser.add_argument(
        "name",
        metavar="REQUEST|DEVICE",
        nargs="?",
        help="a request ID, a device's UUID, a token's subject, or an address",
    )
    add_operator(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Fetches the requests and prints them."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    if parsed.name is None:
        answer = server.get("/api/v1/trace")
        with server.parsing("refused clients"):
            text = refused_as_text(answer["refused"], time.time())
    else:
        answer = server.get(f"/api/v1/trace/{quote(parsed.name, safe='')}")
        with server.parsing("requests"):
            text = requests_as_text(answer["requests"], time.time())
    print(json.dumps(answer) if parsed.json else text)
    return OK


def requests_as_text(requests: Sequence[Mapping[str, Any]], now: float) -> str:
    """Returns requests as text, one with all its fields or several as a table."""
    if len(requests) == 1:
        (one,) = requests
        return fields(
            [
                ("request", one["request"]),
                ("ended", f"{ago(now - one['when'])} ago, {one['end'] or '-'}"),
                ("status", str(one["status"])),
                *([("reason", one["reason"])] if one["reason"] else []),
                ("subject", one["subject"] or "- (no valid token)"),
                ("address", one["peer"] or "-"),
                ("image", one["image"] or "-"),
                ("path", f"{one['method']} {one['path']}"),
                ("sent", f"{size(one['bytes'])} in {one['seconds']:.2f} s"),
            ]
        )
    rows = [
        [
            ago(now - one["when"]),
            str(one["status"]),
            size(one["bytes"]),
            f"{one['seconds']:.2f} s",
            one["end"],
            one["request"],
            _shortened(one["image"]),
            _shortened(one["path"]),
            one["reason"],
        ]
        for one in requests
    ]
    head = [">age", ">status", ">sent", ">took", "end", "request", "image", "path", "reason"]
    return table(head, rows)


def _shortened(text: str) -> str:
    """Returns the text with 12 digits of each digest, so that a row of a table stays readable."""
    return _DIGEST.sub(r"\1", text)


def refused_as_text(clients: Sequence[Mapping[str, Any]], now: float) -> str:
    """Returns the refused clients as text."""
    if not clients:
        return "no client was refused"
    rows = [
        [
            ago(now - client["last"]["when"]),
            f"{client['count']:,}",
            str(client["last"]["status"]),
            client["client"],
            client["last"]["request"],
            _shortened(client["last"]["image"]),
            client["last"]["reason"],
        ]
        for client in clients
    ]
    return table([">age", ">times", ">status", "client", "last request", "image", "reason"], rows)
