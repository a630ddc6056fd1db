"""``obdelta worker``: builds for frontends (``builds = workers``), and serves no device."""

from __future__ import annotations

import argparse

from obdelta.cli.commands.server.serve import run_twistd
from obdelta.cli.options import Commands, add_setting_options


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "worker",
        run,
        "build deltas for servers on other machines",
        "Takes jobs from the Redis of the setting `shared`, builds the deltas, and pushes them to"
        " the registry.\nListens only on `operator-listen`, for health and metrics. Runs"
        " `max-builds` jobs at a time.\nGive it the servers' settings, and a `state-dir` of its"
        " own. For services, use `twistd obdelta --worker`.",
        ["obdelta worker", "obdelta worker -c tap.conf --state-dir /var/lib/obdelta-worker"],
    )
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Runs twistd with the same options, in this process."""
    return run_twistd(parsed, "--worker")
