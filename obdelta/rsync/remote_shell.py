"""rsync's remote shell: starts the remote side on this machine, on the tree named in the
environment.

``python remote_shell.py HOST rsync --server …e.LsfxCIvu … PATH``. The capabilities are reduced to
those that readers from 3.1.1 on know (the result is ``batch.COMPATIBILITY``). The path is set here:
rsync would quote it for a shell. This file imports nothing of obdelta and is run as a script, since
it starts with every build.
"""

import os
import re
import sys

BASE = "OBDELTA_RSYNC_BASE"
_CAPABILITIES = re.compile(r"(-[A-Za-z0-9]*e)\.[A-Za-z]*")


def arguments(rsync_arguments: list[str], base: str) -> list[str]:
    """Returns the command to run for rsync's arguments (host, program, ``--server``, options,
    ``.``, path). Raises ValueError for other arguments.
    """
    _, program, server, *options, dot, _ = rsync_arguments
    if server != "--server" or dot != ".":
        raise ValueError("rsync starts its remote side in an unknown way")
    cut = [
        _CAPABILITIES.sub(r"\1.Lsf", option) if _CAPABILITIES.fullmatch(option) else option
        for option in options
    ]
    if sum(new != old for new, old in zip(cut, options, strict=True)) != 1:
        raise ValueError("rsync sends its capabilities in an unknown way")
    return [program, server, *cut, dot, base]


if __name__ == "__main__":
    command = arguments(sys.argv[1:], os.environ[BASE])
    os.execvp(command[0], command)  # noqa: S606 - no shell is the point of it
