"""``obdelta status`` and ``obdelta builds``: what a running server does, asked at its operators'
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
    """Both commands."""
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
    """Asks, prints."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    told = server.get("/api/v1/status")
    with server.understood("a status"):
        text = json.dumps(told) if parsed.json else status_as_text(told)
        problems = told["problems"]
    print(text)
    return FOUND_WANTING if problems else OK


def builds(parsed: argparse.Namespace) -> int:
    """Asks, prints."""
    from obdelta.cli.operator_client import operator

    server = operator(parsed)
    told = server.get("/api/v1/builds")
    with server.understood("builds"):
        text = json.dumps(told) if parsed.json else builds_as_text(told["builds"])
    print(text)
    return OK


def status_as_text(told: Mapping[str, Any]) -> str:
    """For people."""
    served, kept, now = told["served"], told["kept"], told["now"]
    saved = served["full_bytes"] - served["delta_bytes"]
    share = f" ({saved / served['full_bytes']:.1%})" if served["full_bytes"] else ""
    used = sum(kept["usage"].values())
    parts = ", ".join(f"{name} {size(count)}" for name, count in kept["usage"].items())
    state = "; ".join(f"{part}: {why}" for part, why in told["problems"].items())
    head = fields(
        [
            ("obdelta", str(told["version"])),
            ("state", f"not ready: {state}" if state else "ready"),
            *(("note", note) for note in told["notes"]),
            (
                "builds",
                f"{told['builds']['running']} under way, {told['builds']['queued']} waiting",
            ),
            ("devices", f"{told['devices']} with a request under way"),
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
        for row in told["deltas"]
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
        for row in told["failures"]
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
    """For people."""
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
    """As much of a name as tells images apart."""
    return f"{image['repository'] or '?'}@{image['digest'].removeprefix('sha256:')[:12]}"
