"""The limit of open files: raised to its maximum, and compared with what the server needs."""

from __future__ import annotations

import resource

from twisted.logger import Logger

from obdelta.errors import Unavailable

log = Logger()

LEAST = 256
"""Open files that the server needs to start. With fewer, builds would fail at random."""
OF_A_BUILD = 64
"""Open files that one build may need, with its downloads, workers and pipes."""


def raise_open_files(max_builds: int) -> None:
    """Raises the soft limit to the hard one, as every waiting device is an open connection.

    Raises Unavailable where the hard limit is too low for any build, and warns where it is too low
    for ``max_builds``.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return
    wanted = LEAST + OF_A_BUILD * max_builds
    if most < LEAST:
        raise Unavailable(
            f"the limit of open files is {most}: {LEAST} are the least, {wanted} and one a device"
            " are good: raise it (LimitNOFILE= of systemd, --ulimit nofile= of Docker, ulimit -Hn)"
        )
    if most < wanted:
        log.warn(
            "the limit of open files is {most}: {builds} builds may need {wanted}, and each device"
            " one more: raise it, or lower max-builds",
            most=most,
            builds=max_builds,
            wanted=wanted,
        )
