"""``obdelta list``, and the commands that act on what it lists: ``retry``, ``cancel``, ``drop``,
``pin``, ``unpin`` and ``forget``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from obdelta.cli.delta_sources import ID
from obdelta.cli.options import OK, Commands, WrongUsage, add_json, add_operator, read_secret
from obdelta.cli.parser import number
from obdelta.cli.tables import ago, short_image, size, table
from obdelta.oci import Form

STATES: Final = ("kept", "building", "queued", "failed", "skipped", "pinned")
SORTS: Final = ("newest", "size", "saved", "served", "used")
ACTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "retry": ("build again what failed or was skipped", "The server queues the builds."),
    "cancel": ("end queued or running builds", "The devices that wait pull in full."),
    "drop": ("remove kept deltas", "Devices in the middle of a pull finish it."),
    "forget": ("forget failures, and pairs that were skipped", "The next request builds again."),
    "pin": ("keep deltas that the quota would evict", "Pinned deltas may take half of the quota."),
    "unpin": ("let the quota evict pinned deltas again", "This alone removes nothing."),
}
_PAGE: Final = 1000


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "list",
        run_list,
        "list the deltas, builds and failures of a server",
        "The ID in the first column is for `obdelta retry`, `cancel`, `drop`, `pin`, `unpin` and"
        " `forget`.",
        [
            "obdelta list --state failed",
            "obdelta list --sort size --limit 10",
            "obdelta list --search acme --json | jq -r '.deltas[].id'",
        ],
    )
    parser.add_argument("--state", choices=STATES, metavar="STATE", help=", ".join(STATES))
    parser.add_argument("--fleet", metavar="FLEET", help="a fleet by name, or by one of its images")
    parser.add_argument("--kind", choices=("v3", "v2"), help="kind of delta")
    parser.add_argument("--form", choices=[form.value for form in Form], help="form of v3 deltas")
    parser.add_argument(
        "--search", metavar="WORDS", help="fleet, service, release, commit, repository, digest, ID"
    )
    parser.add_argument(
        "--sort",
        choices=SORTS,
        default="newest",
        metavar="ORDER",
        help="newest (default), size, saved, served, used",
    )
    parser.add_argument(
        "--limit", metavar="N", type=number(1), default=100, help="entries to list (100)"
    )
    add_operator(parser)
    add_json(parser)
    for name, (summary, about) in ACTIONS.items():
        parser = commands.add(
            name, run_action, summary, about, [f"obdelta {name} 0123456789abcdef"]
        )
        parser.add_argument("ids", metavar="ID", nargs="+", help="as `obdelta list` shows it")
        if name == "retry":
            parser.add_argument(
                "--authorization",
                metavar="@FILE",
                help="a file with the Authorization header for the upstream",
            )
        add_operator(parser)
        add_json(parser)
        parser.set_defaults(action=name)


def run_list(parsed: argparse.Namespace) -> int:
    """Fetches as many pages as needed, and prints them."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    names = ("state", "fleet", "kind", "form", "search", "sort")
    query = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    found: list[Mapping[str, Any]] = []
    following: str | None = ""
    while following is not None and len(found) < parsed.limit:
        limit = min(_PAGE, parsed.limit - len(found))
        after = {"after": following} if following else {}
        answer = server.get("/api/v1/deltas/list", **query, **after, limit=str(limit))
        with server.parsing("a list of deltas"):
            found += answer["deltas"]
            following = answer["next"]
    with server.parsing("a list of deltas"):
        text = as_text(found, time.time())
    print(json.dumps({"deltas": found, "next": following}) if parsed.json else text)
    return OK


def run_action(parsed: argparse.Namespace) -> int:
    """Acts on each ID in turn, and prints the new states."""
    from obdelta.cli.operator_client import operator
    from obdelta.device.http import ServerFault

    for name in parsed.ids:
        if not ID.fullmatch(name):
            raise WrongUsage(f"{name!a} is no ID of a delta: `obdelta list` shows them")
    given = getattr(parsed, "authorization", None)
    authorization = read_secret(given, "--authorization") if given is not None else None
    server = operator(parsed)
    done: list[Mapping[str, Any]] = []
    try:
        for name in parsed.ids:
            path = f"/api/v1/deltas/{name}/{parsed.action}"
            try:
                done.append(server.post(path, {}, authorization=authorization))
            except ServerFault as error:
                which = f"{name}: " if len(parsed.ids) > 1 else ""
                raise ServerFault(which + error.what, error.why, status=error.status) from error
    finally:
        # The results before an error are not lost.
        if done:
            with server.parsing("a delta"):
                text = as_text(done, time.time())
            print(json.dumps({"deltas": done}) if parsed.json else text)
    return OK


def as_text(deltas: Sequence[Mapping[str, Any]], now: float) -> str:
    """Returns the entries as a table."""
    if not deltas:
        return "no deltas"
    rows = [
        [
            delta["id"],
            "pinned" if delta["pinned"] else delta["state"],
            ago(now - delta["since"]),
            delta["kind"] if delta["kind"] == "v2" else f"{delta['kind']} {delta['form']}",
            size(delta["full_bytes"]) if delta["full_bytes"] is not None else "",
            size(delta["bytes"]) if delta["bytes"] is not None else "",
            size(delta["saved"]),
            f"{delta['served']:,}",
            _image(delta, "dest"),
            _image(delta, "src"),
            delta["reason"] or "",
        ]
        for delta in deltas
    ]
    head = ["id", "state", ">for", "kind", ">full", ">delta", ">saved", ">served"]
    return table([*head, "target", "base", "reason"], rows)


def _image(delta: Mapping[str, Any], part: str) -> str:
    repository, _, digest = delta[part].rpartition("@")
    return short_image(repository, digest, delta["names"].get(part, {}).get("text", ""))
