"""``make demo``: two releases of a real image, the proxy, and a device that updates from one to the
other through it.

The releases are made of real files: Python's standard library, wheels that ``pip download`` fetches
in two published versions (the only use of the network), and a small application. The proxy is
``obdelta serve`` with the embedded upstream. The update is made twice: with a delta image (v3)
and with an rsync batch (v2). Every figure is of an update that the device has verified; the exit
status is 0 only then.

``KEEP=1`` leaves the server running. ``python -m bench.demo stop`` (``make demo-stop``) stops it
and removes everything that demos have left.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import packages, rsync_device
from bench.demo_images import HOST, NATIVE, PURE, Release, make_releases
from bench.rsync_device import Applied
from obdelta.device.http import Http, ServerFault
from obdelta.device.pull import Engine
from obdelta.device.update import Base, Device, Update
from obdelta.errors import ObdeltaError
from obdelta.oci.reference import Reference
from obdelta.store import operator_address

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
CONFIG, PID = "tap.conf", "pid"
START_SECONDS = 30
STOP_SECONDS = 15


def main() -> int:
    """Makes, serves, updates, prints; the process's exit status."""
    keep = bool(os.environ.get("KEEP"))
    FOLDER.mkdir(exist_ok=True)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=FOLDER))
    kept = False
    # By default SIGTERM would end only this process, and leave the proxy and its folder.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        say("all of this takes a minute or more, and 1 GB of disk below .demo")
        say("making two releases of an image from real files (wheels come by pip download, once)")
        old, new = make_releases(run / "images", FOLDER / "packages")
        with proxy(run, lambda: kept) as (process, server):
            update = be_a_device(server, old, new, run / "device")
            applied = (
                be_an_rsync_device(server, old, new, run / "rsync-device")
                if update.is_delta
                else None
            )
            print(as_table(old, new, update, applied))
            if not update.is_delta:
                why = [
                    line
                    for line in (run / "obdelta.log").read_text().splitlines()
                    if "full pull" in line
                ]
                print(
                    "\n".join(["not shown: the proxy answered with a full pull", *why]),
                    file=sys.stderr,
                )
                return 1
            if keep:
                kept = True
                (run / PID).write_text(f"{process.pid}\n")
                for work in ("device", "rsync-device"):
                    shutil.rmtree(run / work, ignore_errors=True)
                print(how_to_go_on(process.pid, server, old, new, run))
        return 0
    except (ObdeltaError, packages.Unavailable) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
        if not kept:
            shutil.rmtree(run, ignore_errors=True)


def stop() -> int:
    """Stops the servers that demos have left, and removes the demos' folder."""
    for run in sorted(FOLDER.glob("run-*")):
        if (pid := server_of(run)) is None:
            continue
        say(f"stopping the server of {os.path.relpath(run)} (process {pid})")
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while server_of(run) is not None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    if FOLDER.exists():
        say(f"removing {os.path.relpath(FOLDER)}, with the downloaded packages")
        shutil.rmtree(FOLDER)
    else:
        say("there is no demo to stop")
    return 0


def server_of(run: Path) -> int | None:
    """The process ID of a folder's server, None where it has ended. The process must have the
    folder's settings: its ID may have been given to another one.
    """
    try:
        pid = int((run / PID).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(run / CONFIG) in words else None


# -- the proxy ---------------------------------------------------------------------------------


@contextmanager
def proxy(run: Path, keeps: Callable[[], bool]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``obdelta serve`` on free ports of loopback. Ends with the block, unless the block ends
    without an error and ``keeps`` returns True then.
    """
    with socket.socket() as free, socket.socket() as free_for_operators:
        free.bind(("127.0.0.1", 0))
        free_for_operators.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        operator_port = free_for_operators.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    config = run / CONFIG
    config.write_text(
        f"[obdelta]\nlisten = tcp:{port}:interface=127.0.0.1\nupstream ="
        f" oci:{run / 'images'}\npublic-url = {server}\nregistry-hosts = {HOST}\nstate-dir ="
        f" {run / 'state'}\nupstream-credentials = none\nauth = none\noperator-listen ="
        f" tcp:{operator_port}:interface=127.0.0.1\n"
    )
    command = [str(Path(sys.executable).with_name("obdelta")), "serve", "--config", str(config)]
    log = run / "obdelta.log"
    # Settings of the user who runs this must not reach into the demo: the environment beats the
    # file.
    own = {name: value for name, value in os.environ.items() if not name.startswith("OBDELTA_")}
    say(f"starting obdelta serve --config {os.path.relpath(config)}")
    with log.open("wb") as out:
        # A session of its own: with KEEP=1 it outlives this shell.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env=own, start_new_session=True
        )
    keep = False
    try:
        wait_until_ready(process, server, log)
        yield process, server
        keep = keeps()
    finally:
        if not keep:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], server: str, log: Path) -> None:
    """Waits until the registry API answers; ServerFault with the log's end when it does not."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with Http().request("GET", f"{server}/v2/") as answer:
                if answer.status == 200:
                    return
        except ServerFault:
            pass
        time.sleep(0.1)
    tail = log.read_text("utf-8", "replace")[-2000:]
    raise ServerFault("obdelta serve", f"did not come up:\n{tail}")


# -- the device --------------------------------------------------------------------------------


def be_a_device(server: str, old: Release, new: Release, work: Path) -> Update:
    """Runs the old release, asks for the new one, patches, and verifies."""
    work.mkdir()
    http = Http()
    device = Device(http, Engine(http, registry=server), server)
    say("a device pulls the old release in full")
    base: Base = device.load_base(Reference.parse(old.reference), work)
    say(
        "the device asks for the new one: obdelta builds the delta; the device pulls, patches, and"
        " checks every diff_id and the image ID"
    )
    return device.update(base, old.reference, new.reference, work)


def be_an_rsync_device(server: str, old: Release, new: Release, work: Path) -> Applied:
    """The same with v2: applied by rsync, and compared with the target's root filesystem."""
    work.mkdir()
    say("a device that knows v2 only has the old release's root filesystem")
    base = rsync_device.root_filesystem(old.image, work / "base")
    target = rsync_device.root_filesystem(new.image, work / "target")
    say(
        "it asks for the new one: obdelta records a batch; rsync applies it, and the result is"
        " compared with the target, entry by entry"
    )
    return rsync_device.update(server, old.reference, new.reference, base, target, new.image, work)


def say(text: str) -> None:
    """One line of progress."""
    print(f"- {text}", flush=True)


def as_table(old: Release, new: Release, update: Update, applied: Applied | None) -> str:
    """The figures; only of verified updates."""
    layers = len(new.image.layers)
    tar_bytes = sum(layer.tar_size for layer in new.image.layers)
    changes = ", ".join(f"{bump.name} {bump.old} → {bump.new}" for bump in (*NATIVE, *PURE))
    lines = [
        "",
        (
            f"Release 2 after release 1: {layers} layers, {tar_bytes:,} bytes unpacked; {changes};"
            " and the app"
        ),
        "",
        (
            f"{'delta':8}{'full update':>16}{'delta bytes':>16}{'saving':>10}"
            f"{'build s':>10}{'pull s':>9}{'apply s':>9}"
        ),
    ]
    rows: list[tuple[str, int, Update | Applied]] = [("v3", update.pulled_bytes, update)]
    if applied is not None:
        rows.append(("v2", applied.pulled_bytes, applied))
    for name, pulled, row in rows:
        lines.append(
            f"{name:8}{update.full_bytes:16,}{pulled:16,}{1 - pulled / update.full_bytes:10.1%}"
            f"{row.request_seconds:10.2f}"
            f"{row.pulling_seconds:9.2f}{row.patching_seconds:9.2f}  verified"
        )
    return "\n".join([*lines, ""])


def how_to_go_on(pid: int, server: str, old: Release, new: Release, run: Path) -> str:
    """Returns the status page's URL, and commands that work as printed, in this directory."""
    config = os.path.relpath(run / CONFIG)
    obdelta = os.path.relpath(Path(sys.executable).with_name("obdelta"))
    pair = f"{old.name} {new.name}"
    page = operator_address.find(run / "state")
    return f"""\
The server goes on (process {pid}, log {os.path.relpath(run / "obdelta.log")}).

The status page, in a browser on this machine:
  {page}/

What it has done, which files made the delta large, and what a supervisor asks:
  {obdelta} status -c {config}
  {obdelta} explain -c {config} {pair}
  curl -s '{server}/api/v3/delta?src={old.name}&dest={new.name}'

A device once more:
  {obdelta} check {pair} --server {server} --registry {server}

Stop it, and remove everything that it left:
  make demo-stop
"""


if __name__ == "__main__":
    sys.exit(stop() if sys.argv[1:] == ["stop"] else main())
