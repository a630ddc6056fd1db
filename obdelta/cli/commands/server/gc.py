"""``obdelta gc``: frees space in ``state-dir``. The running server does this, or the command if
none runs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdelta.cli.options import (
    OK,
    Commands,
    add_json,
    add_operator,
    add_setting_options,
    read_settings,
)
from obdelta.cli.parser import size
from obdelta.cli.tables import table
from obdelta.errors import SettingsError, StateInUse
from obdelta.settings import Settings

if TYPE_CHECKING:
    from obdelta.app.runtime import Runtime


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "gc",
        run,
        "free space in state-dir",
        "Enforces the quota now. With --free it then frees that many bytes. The least "
        "recently used content is\n"
        "evicted first; content in use, or served within `keep-served`, stays. A "
        "running server does this work, through its\n"
        "operators' endpoint. Without one it is done here, and no server can start "
        "until it ends.",
        ["obdelta gc -c tap.conf", "obdelta gc --free '5 GiB'"],
    )
    parser.add_argument(
        "--free", metavar="SIZE", type=size, default=0, help="bytes to free, such as 5 GiB"
    )
    add_operator(parser, config=False)
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Collects, and prints what was removed and what is left."""
    done = _collected(parsed, parsed.free)
    print(json.dumps(done) if parsed.json else as_text(done))
    return OK


def as_text(done: Mapping[str, Any]) -> str:
    """Returns the result as text."""
    rows = [[name, f"{kept:,}"] for name, kept in sorted(done["usage"].items())]
    rows += [["together", f"{sum(done['usage'].values()):,}"], ["quota", f"{done['quota']:,}"]]
    over = (
        f"\n{done['over']:,} bytes above the quota stay: in use, served within keep-served, or too"
        " small to free anything"
        if done["over"]
        else ""
    )
    return f"freed {done['freed']:,} bytes\n\n{table(['kept', '>bytes'], rows)}{over}"


def _collected(parsed: argparse.Namespace, wanted: int) -> dict[str, Any]:
    from obdelta.cli.operator_client import operator
    from obdelta.device.http import ServerFault

    empty: Path | None = None
    if parsed.operator is None:
        # Collection does not depend on the upstream registry.
        configured = read_settings(
            parsed, {"public-url": "http://localhost", "upstream": "http://localhost"}
        )
        try:
            # Without a catalogue there is nothing to collect: the directory is wrong, or on another
            # machine.
            if (configured.state_dir / "catalogue.sqlite").exists():
                return _collected_here(configured, wanted)
            empty = configured.state_dir
        except StateInUse:
            pass  # a server has the state, and shall collect
    server = operator(parsed, timeout=3600.0)
    try:
        done = server.post("/api/v1/gc", {"free": wanted})
    except ServerFault as error:
        if empty is not None and error.status is None:
            raise SettingsError(
                "state-dir",
                str(empty),
                f"a directory with catalogue.sqlite, or a running server ({error})",
            ) from error
        raise
    with server.parsing("figures"):
        as_text(done)
    return done


def _collected_here(configured: Settings, wanted: int) -> dict[str, Any]:
    from obdelta.app.components import open_state
    from obdelta.cli import run_reactor
    from obdelta.web.operators.maintenance_api import collected_as_json

    os.umask(0o077)  # as a server does

    async def collect(runtime: Runtime) -> dict[str, Any]:
        state = await open_state(runtime)
        return collected_as_json(await state.quota_service.collect(wanted), configured.store_quota)

    return run_reactor.run(configured, collect)
