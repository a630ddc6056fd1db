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
        "Takes jobs from the Redis that `shared` names, builds, and pushes to the registry.\n"
        "Only `operator-listen` is opened, for health and metrics. `max-builds` jobs run at a"
        " time.\nGive it the servers' settings, and a `state-dir` of its own."
        " `twistd obdelta --worker` is\nthe form for services.",
        ["obdelta worker", "obdelta worker -c tap.conf --state-dir /var/lib/obdelta-worker"],
    )
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Runs twistd with the same options, in this process."""
    return run_twistd(parsed, "--worker")
