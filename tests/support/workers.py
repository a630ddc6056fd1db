"""The command line of real ``obdelta worker`` processes, and what their logs and Redis show."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.support.server import RunningServer, command


def worker_command(*options: str, constants: Mapping[str, float] | None = None) -> list[str]:
    """How ``twistd obdelta --worker`` is run with this interpreter; no pid file."""
    return [*command(constants=constants), "--worker", *options]


def outcomes(*servers: RunningServer) -> list[str]:
    """How builds ended, of all servers."""
    return [
        outcome
        for server in servers
        for outcome in re.findall(r"build: pair=.* outcome=(\w+)", server.log)
    ]
