"""``obdelta prepare``: a running server builds deltas before devices ask for them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from obdelta.cli.options import (
    FAILED,
    OK,
    UNSATISFIED,
    Commands,
    WrongUsage,
    add_json,
    add_operator,
    read_secret,
)
from obdelta.cli.parser import number, size
from obdelta.cli.tables import printable, table
from obdelta.cli.tables import size as shown_size
from obdelta.cli.terminal import Line

if TYPE_CHECKING:
    from obdelta.cli.operator_client import Operator

PAUSE: Final = 0.5
"""Seconds between two requests for the progress."""
_FINAL: Final = frozenset(("ready", "full-pull", "failed"))


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "prepare",
        run,
        "have a running server build deltas before devices ask for them",
        "Takes pairs of images; or one target image, and with --last the number of base"
        " images that devices requested updates\n"
        "from last. Waits until every delta is ready, and prints sizes and ratios. "
        "Exits with 1 if a build failed, and with 3\n"
        "if devices would pull more than --fail-above, or if a delta is impossible. "
        "A delta that would save nothing is no\nfailure.",
        [
            "obdelta prepare v2/0123… v2/4567…",
            "obdelta prepare --last 5 --rollback v2/89ab…",
            "obdelta prepare --fail-above '20 MiB' --json v2/0123… v2/4567…",
        ],
    )
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="SRC DEST [SRC DEST …]; with --last only one DEST",
    )
    parser.add_argument(
        "--last",
        metavar="N",
        type=number(1),
        help="build from the last N images that devices requested updates from",
    )
    parser.add_argument(
        "--like",
        metavar="IMAGE",
        help="with --last: the release that devices run; builds from it, and from its bases",
    )
    parser.add_argument("--rollback", action="store_true", help="build the opposite direction, too")
    parser.add_argument(
        "--kind", choices=("v3", "v2", "both"), default="v3", help="kind of delta (v3)"
    )
    parser.add_argument(
        "--fail-above",
        metavar="SIZE",
        type=size,
        help="exit with 3 if a delta is larger, such as 20 MiB",
    )
    parser.add_argument(
        "--no-wait",
        action="store_true",
        help="start the builds and print the list's ID, without waiting",
    )
    parser.add_argument(
        "--authorization",
        metavar="@FILE",
        help='a file with the Authorization header for the upstream ("Bearer …")',
    )
    add_operator(parser)
    add_json(parser)


def run(parsed: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> int:
    """Starts the builds, waits for them, and prints the results."""
    from obdelta.cli.operator_client import operator

    most: int | None = parsed.fail_above
    if parsed.no_wait and most is not None:
        raise WrongUsage("--fail-above cannot be used with --no-wait: the sizes are not known yet")
    body = _body(parsed)
    server = operator(parsed)
    begun = server.post("/api/v1/prepare", body, authorization=_authorization(parsed.authorization))
    with server.parsing("a list"):
        done = begun if parsed.no_wait else _followed(server, begun, sleep)
        jobs = done["jobs"]
        text = (
            json.dumps(done)
            if parsed.json
            else printable(begun["id"])
            if parsed.no_wait
            else as_text(jobs)
        )
        status = OK if parsed.no_wait else _status(jobs, most)
    print(text)
    return status


def as_text(jobs: list[Mapping[str, Any]]) -> str:
    """Returns the jobs as text."""
    rows = [
        [
            job["kind"],
            job["state"],
            shown_size(job["full_bytes"]) if job["full_bytes"] is not None else "",
            shown_size(job["delta_bytes"]) if job["delta_bytes"] is not None else "",
            f"{job['ratio']:.1%}" if job["ratio"] is not None else "",
            f"{job['seconds']:.1f} s",
            printable(
                f"{job['src']} -> {job['dest']}" + (f" ({job['reason']})" if job["reason"] else "")
            ),
        ]
        for job in jobs
    ]
    return table(["kind", "state", ">full", ">delta", ">ratio", ">took", "pair"], rows)


def _followed(
    server: Operator, preparation: dict[str, Any], sleep: Callable[[float], None]
) -> dict[str, Any]:
    with Line(sys.stderr) as line:
        while not preparation["done"]:
            jobs = preparation["jobs"]
            ready = sum(job["state"] in _FINAL for job in jobs)
            under_way = next((job for job in jobs if job["state"] == "building"), None)
            stage = (
                printable(str(under_way["progress"].get("stage", "")))
                if under_way is not None
                else ""
            )
            line.show(f"{ready}/{len(jobs)} {stage}", ready / len(jobs))
            sleep(PAUSE)
            preparation = server.get(f"/api/v1/prepare/{preparation['id']}")
    return preparation


def _status(jobs: list[Mapping[str, Any]], most: int | None) -> int:
    if any(job["state"] == "failed" for job in jobs):
        return FAILED
    # A full pull that is as small as a delta counts as success.
    wanting = any(job["state"] == "full-pull" and job["category"] != "not-worth" for job in jobs)
    pulled = [
        job["full_bytes"] if job["delta_bytes"] is None else job["delta_bytes"] for job in jobs
    ]
    return (
        UNSATISFIED
        if wanting or (most is not None and any((size or 0) > most for size in pulled))
        else OK
    )


def _body(parsed: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {
        "kinds": ["v3", "v2"] if parsed.kind == "both" else [parsed.kind],
        "rollback": parsed.rollback,
    }
    images = parsed.images
    if parsed.last is not None:
        if len(images) != 1:
            raise WrongUsage("--last takes one image, the target")
        body |= {"dest": images[0], "last": parsed.last}
        if parsed.like is not None:
            body["like"] = parsed.like
    elif parsed.like is not None:
        raise WrongUsage("--like requires --last")
    elif len(images) % 2:
        raise WrongUsage("images are given in pairs, SRC DEST; one alone requires --last")
    else:
        body["pairs"] = [
            {"src": src, "dest": dest} for src, dest in zip(images[::2], images[1::2], strict=True)
        ]
    return body


def _authorization(given: str | None) -> str | None:
    if given is None:
        return None
    return read_secret(given, "--authorization")
