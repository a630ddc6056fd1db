"""rsync's far side: what rsync calls as its remote shell, to run on this machine, on the tree that
the environment names.

``python far_side.py HOST rsync --server …e.LsfxCIvu … PATH``. The capabilities are cut down to
those that readers from 3.1.1 on know (``batch.COMPATIBILITY`` is what comes of it), and the path is
put in: rsync would quote it for a shell. It imports nothing of ours and is run as a file: it starts
with every build.
"""

import os
import re
import sys

BASE = "OBDELTA_RSYNC_BASE"
_CAPABILITIES = re.compile(r"(-[A-Za-z0-9]*e)\.[A-Za-z]*")


def arguments(told: list[str], base: str) -> list[str]:
    """What to run in place of what rsync says (host, program, ``--server``, options, ``.``, path).
    ValueError otherwise.
    """
    _, program, server, *options, dot, _ = told
    if server != "--server" or dot != ".":
        raise ValueError("rsync runs its far side in an unknown way")
    cut = [
        _CAPABILITIES.sub(r"\1.Lsf", option) if _CAPABILITIES.fullmatch(option) else option
        for option in options
    ]
    if sum(new != old for new, old in zip(cut, options, strict=True)) != 1:
        raise ValueError("rsync tells its capabilities in an unknown way")
    return [program, server, *cut, dot, base]


if __name__ == "__main__":
    command = arguments(sys.argv[1:], os.environ[BASE])
    os.execvp(command[0], command)  # noqa: S606 - no shell is the point of it
