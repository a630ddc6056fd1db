"""The real rsync, stopped in the middle of its batch until the test continues it: for tests while
rsync still writes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SCRIPT = """#!{python}
import os, re, subprocess, sys
arguments = sys.argv[1:]
batches = [number for number, one in enumerate(arguments) if one.startswith("--only-write-batch=")]
if not batches or "--server" in arguments:
    os.execv("/usr/bin/rsync", ["rsync", *arguments])
(at,) = batches
pipe = arguments[at].partition("=")[2]
whole = {whole!r}
arguments[at] = "--only-write-batch=" + whole
ran = subprocess.run(["/usr/bin/rsync", *arguments], stdout=subprocess.PIPE)
if ran.returncode:
    sys.exit(ran.returncode)
lines = re.findall(rb"sent [0-9]+ .*", ran.stdout)
batch = open(whole, "rb").read()
os.unlink(whole)
first = int(len(batch) * {share})
sizes = [int(line.split()[1]) for line in lines]
reported = 0
while reported < len(lines) and sum(sizes[:reported + 1]) <= sum(sizes) * {reported}:
    reported += 1
sys.stdout.write("".join(line.decode() + "\\n" for line in lines[:reported]))
sys.stdout.flush()
with open(pipe, "wb", buffering=0) as out:
    out.write(batch[:first])
    with open({gate!r}) as gate:
        order = gate.read()
    if order == "fail":
        print("rsync: told to fail", file=sys.stderr)
        sys.exit(11)
    sys.stdout.write("".join(line.decode() + "\\n" for line in lines[reported:]))
    sys.stdout.flush()
    out.write(batch[first:])
"""


class HeldRsync:
    """``environment``: variables for the server. rsync stops after ``share`` of the batch, and
    reports ``reported`` of all bytes as sent by then, or a little less.
    """

    def __init__(
        self,
        directory: Path,
        *,
        share: float = 0.9,
        reported: float = 0.9,
        python: str = sys.executable,
    ) -> None:
        directory.mkdir()
        self._gate = directory / "gate"
        os.mkfifo(self._gate)
        self._gate.chmod(0o666)
        script = directory / "rsync"
        script.write_text(
            _SCRIPT.format(
                python=python,
                whole=str(directory / "whole"),
                share=share,
                reported=reported,
                gate=str(self._gate),
            )
        )
        script.chmod(0o755)
        self.environment = {"PATH": f"{directory}:{os.environ['PATH']}"}

    def go_on(self) -> None:
        """Lets rsync write the rest, after it has stopped."""
        self._gate.write_text("go on")

    def fail(self) -> None:
        """Ends rsync with status 11 instead."""
        self._gate.write_text("fail")
