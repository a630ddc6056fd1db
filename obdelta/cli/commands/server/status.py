"""``obdelta status`` and ``obdelta builds``: the work of a running server, from its operators'
endpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from obdelta.cli.options import OK, UNSATISFIED, Commands, add_json, add_operator
from obdelta.cli.tables import ago, counted, fields, printable, short_image, size, table


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "status",
        status,
        "show the state of a running server",
        "Health, savings, store, the newest deltas and failures. Exits with 3 if the server is not"
        " ready, and shows the problems.",
        ["obdelta status", "obdelta status --operator http://10.0.0.5:9100 --json | jq .served"],
    )
    add_operator(parser)
    add_json(parser)
    parser = commands.add(
        "builds",
        builds,
        "list the running and queued builds of a server",
        examples=["obdelta builds", "watch obdelta builds"],
    )
    add_operator(parser)
    add_json(parser)


def status(parsed: argparse.Namespace) -> int:
    """Fetches the status and prints it."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    answer = server.get("/api/v1/status")
    with server.parsing("a status"):
        text = json.dumps(answer) if parsed.json else status_as_text(answer)
        problems = answer["problems"]
    print(text)
    return UNSATISFIED if problems else OK


def builds(parsed: argparse.Namespace) -> int:
    """Fetches the builds and prints them."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    answer = server.get("/api/v1/builds")
    with server.parsing("builds"):
        text = json.dumps(answer) if parsed.json else builds_as_text(answer["builds"])
    print(text)
    return OK


def status_as_text(answer: Mapping[str, Any]) -> str:
    """Returns the status as text."""
    served, kept, now = answer["served"], answer["kept"], answer["now"]
    saved = served["full_bytes"] - served["delta_bytes"]
    share = f" ({saved / served['full_bytes']:.1%})" if served["full_bytes"] else ""
    used = sum(kept["usage"].values())
    parts = ", ".join(f"{name} {size(count)}" for name, count in kept["usage"].items())
    state = "; ".join(f"{part}: {why}" for part, why in answer["problems"].items())
    head = fields(
        [
            ("obdelta", str(answer["version"])),
            ("state", f"not ready: {state}" if state else "ready"),
            *(("note", note) for note in answer["notes"]),
            (
                "builds",
                f"{answer['builds']['running']} running, {answer['builds']['queued']} queued",
            ),
            ("devices", f"{answer['devices']} with a request in progress"),
            (
                "served",
                f"{counted(served['deltas'], 'delta')}, {size(served['delta_bytes'])}:"
                f" {size(saved)} saved{share}",
            ),
            ("store", f"{size(used)} of {size(kept['quota'])} ({parts})"),
            ("deltas", f"{kept['deltas']:,} kept"),
        ]
    )
    deltas = [
        [
            row.get("id", ""),
            ago(now - row["created"]),
            _kind(row),
            size(row["full_bytes"]),
            size(row["delta_bytes"]),
            f"{1 - row['delta_bytes'] / row['full_bytes']:.1%}" if row["full_bytes"] else "",
            f"{row['seconds']:.1f} s",
            f"{row['served']:,}",
            _image(row["target"]),
            _image(row["base"]),
        ]
        for row in answer["deltas"]
    ]
    failures = [
        [
            row.get("id", ""),
            ago(now - row["last"]),
            row["kind"],
            f"{row['count']:,}",
            _image(row["target"]),
            _image(row["base"]),
            row["reason"],
        ]
        for row in answer["failures"]
    ]
    fleets = [
        [
            f"{fleet['link_bits_per_second'] / 1e6:g} Mbit/s",
            f"{fleet['command_microseconds']:g} µs",
            f"{fleet['devices']:,}",
            fleet["reads"],
            fleet["repository"],
        ]
        for fleet in answer.get("fleets", ())
    ]
    wrong = [
        [one["severity"], ago(now - one["since"]), one["what"], one["remedy"]]
        for one in answer.get("attention", ())
    ]
    shown = [head]
    if wrong:
        shown.append(table(["attention", ">for", "problem", "remedy"], wrong))
    if deltas:
        heads = [
            "id",
            ">age",
            "kind",
            ">full",
            ">delta",
            ">saved",
            ">built in",
            ">served",
            "target",
            "base",
        ]
        shown.append(table(heads, deltas))
    if failures:
        shown.append(
            table(["id", ">age", "kind", ">times", "failed target", "base", "reason"], failures)
        )
    if fleets:
        shown.append(table([">link", ">a command", ">devices", "reads", "fleet"], fleets))
    return "\n\n".join(shown)


def builds_as_text(found: list[Mapping[str, Any]]) -> str:
    """Returns the builds as text."""
    if not found:
        return "no builds"
    rows = [
        [
            build.get("id", ""),
            build["state"],
            ago(build["seconds"]),
            f"{build['waiting']:,}",
            _progress(build["progress"]),
            build["pair"],
            build.get("names", {}).get("target", {}).get("text", ""),
        ]
        for build in found
    ]
    return table(["id", "state", ">for", ">clients", "at", "pair", "name"], rows)


def _progress(progress: Mapping[str, Any]) -> str:
    stage = printable(str(progress.get("stage", "")))
    if not progress.get("layers"):
        return stage
    share = f" {progress['done'] / progress['of']:.0%}" if progress.get("of") else ""
    return f"layer {progress['layer'] + 1}/{progress['layers']} {stage}{share}"


def _kind(row: Mapping[str, Any]) -> str:
    """Returns ``v3 gzip``, ``v3 zstd`` or ``v2``; older servers do not report the form."""
    form = row.get("form") if row["kind"] == "v3" else None
    return f"{row['kind']} {form}" if form else str(row["kind"])


def _image(row: Mapping[str, Any]) -> str:
    return short_image(row["repository"], row["digest"], row.get("names", {}).get("text", ""))
