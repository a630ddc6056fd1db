"""``obdelta status`` and ``obdelta builds``: the work of a running server, from its operators'
endpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from obdelta.cli.options import FOUND_WANTING, OK, Commands, add_json
from obdelta.cli.tables import ago, fields, printable, size, table


def add_to(commands: Commands) -> None:
    from obdelta.cli.operator_client import add_operator

    parser = commands.add(
        "status",
        status,
        "tell how a running server does: health, savings, store, newest deltas and failures",
        "Exits with 3 when the server is not ready to work; what is wrong is shown.",
        ["obdelta status", "obdelta status --operator http://10.0.0.5:9100 --json | jq .served"],
    )
    add_operator(parser)
    add_json(parser)
    parser = commands.add(
        "builds",
        builds,
        "list the builds that a running server has under way or waiting",
        examples=["obdelta builds", "watch obdelta builds"],
    )
    add_operator(parser)
    add_json(parser)


def status(parsed: argparse.Namespace) -> int:
    """Fetches the status and prints it."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    answer = server.get("/api/v1/status")
    with server.understood("a status"):
        text = json.dumps(answer) if parsed.json else status_as_text(answer)
        problems = answer["problems"]
    print(text)
    return FOUND_WANTING if problems else OK


def builds(parsed: argparse.Namespace) -> int:
    """Fetches the builds and prints them."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    answer = server.get("/api/v1/builds")
    with server.understood("builds"):
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
                f"{answer['builds']['running']} under way, {answer['builds']['queued']} waiting",
            ),
            ("devices", f"{answer['devices']} with a request under way"),
            (
                "served",
                (
                    f"{served['deltas']:,} deltas, {size(served['delta_bytes'])}: {size(saved)}"
                    f" saved{share}"
                ),
            ),
            ("store", f"{size(used)} of {size(kept['quota'])} ({parts})"),
            ("deltas", f"{kept['deltas']:,} kept"),
        ]
    )
    deltas = [
        [
            ago(now - row["created"]),
            row["kind"],
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
            ago(now - row["last"]),
            row["kind"],
            f"{row['count']:,}",
            _image(row["target"]),
            _image(row["base"]),
            row["reason"],
        ]
        for row in answer["failures"]
    ]
    shown = [head]
    if deltas:
        heads = [
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
            table([">age", "kind", ">times", "target that failed", "base", "reason"], failures)
        )
    return "\n\n".join(shown)


def builds_as_text(found: list[Mapping[str, Any]]) -> str:
    """Returns the builds as text."""
    if not found:
        return "no builds"
    rows = [
        [
            build["state"],
            ago(build["seconds"]),
            f"{build['waiting']:,}",
            _progress(build["progress"]),
            build["pair"],
        ]
        for build in found
    ]
    return table(["state", ">for", ">clients", "at", "pair"], rows)


def _progress(progress: Mapping[str, Any]) -> str:
    stage = printable(str(progress.get("stage", "")))
    if not progress.get("layers"):
        return stage
    share = f" {progress['done'] / progress['of']:.0%}" if progress.get("of") else ""
    return f"layer {progress['layer'] + 1}/{progress['layers']} {stage}{share}"


def _image(image: Mapping[str, str]) -> str:
    """Returns as much of a name as distinguishes images."""
    return f"{image['repository'] or '?'}@{image['digest'].removeprefix('sha256:')[:12]}"
