"""``obdelta gc``: frees space in ``state-dir``, by the running server, or here when none runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from obdelta.cli.options import (
    OK,
    Commands,
    WrongUsage,
    add_json,
    add_setting_options,
    read_settings,
)
from obdelta.cli.tables import table
from obdelta.errors import StateInUse
from obdelta.settings import Settings
from obdelta.settings.parsers import size

if TYPE_CHECKING:
    from obdelta.app.state import Closers
    from obdelta.concurrency.threads import Threads


def add_to(commands: Commands) -> None:
    from obdelta.cli.operator_client import add_operator

    parser = commands.add(
        "gc",
        run,
        "free space in state-dir",
        "Enforces the quota now, and with --free goes on until so many bytes are free: what was not"
        " used for longest goes\nfirst. What is in use, or was served within `grace`, stays. While"
        " a server uses the folder it does the work, asked at\nits operators' endpoint; while none"
        " does, it is done here, and no server can start until it is over.",
        ["obdelta gc -c tap.conf", "obdelta gc --free '5 GiB'"],
    )
    parser.add_argument(
        "--free", metavar="SIZE", default="0", help="free so many bytes, such as 5 GiB"
    )
    add_operator(parser, config=False)
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Collects, and prints what was removed and what is left."""
    try:
        wanted = size(parsed.free)
    except ValueError as error:
        raise WrongUsage(
            f"--free has the value {parsed.free!a}: expected bytes, such as 5 GiB"
        ) from error
    done = _collected(parsed, wanted)
    print(json.dumps(done) if parsed.json else as_text(done))
    return OK


def as_text(done: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    rows = [[name, f"{kept:,}"] for name, kept in sorted(done["usage"].items())]
    rows += [["together", f"{sum(done['usage'].values()):,}"], ["quota", f"{done['quota']:,}"]]
    over = (
        f"\n{done['over']:,} bytes above the quota stay: in use, served within the grace, or too"
        " small to free anything"
        if done["over"]
        else ""
    )
    return f"freed {done['freed']:,} bytes\n\n{table(['kept', '>bytes'], rows)}{over}"


def _collected(parsed: argparse.Namespace, wanted: int) -> dict[str, Any]:
    from obdelta.cli.operator_client import operator

    if parsed.operator is None:
        # Collection does not depend on the upstream registry.
        configured = read_settings(
            parsed, {"public-url": "http://localhost", "upstream": "http://localhost"}
        )
        try:
            # Without a catalogue there is nothing to collect: the folder is wrong, or on another
            # machine.
            if (configured.state_dir / "catalogue.sqlite").exists():
                return _collected_here(configured, wanted)
        except StateInUse:
            pass  # a server has the state, and shall collect
    server = operator(parsed, timeout=3600.0)
    done = server.post("/api/v1/gc", {"free": wanted})
    with server.understood("figures"):
        as_text(done)
    return done


def _collected_here(configured: Settings, wanted: int) -> dict[str, Any]:
    from obdelta.app.state import open_state
    from obdelta.cli import run_reactor
    from obdelta.web.operators.gc_api import collected_as_json

    os.umask(0o077)  # as a server does

    async def collect(reactor: Any, threads: Threads, closers: Closers) -> dict[str, Any]:
        state = await open_state(configured, reactor, threads, closers)
        return collected_as_json(await state.upkeep.collect(wanted), configured.store_quota)

    return run_reactor.run(collect)
