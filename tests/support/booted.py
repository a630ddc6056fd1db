"""A booted systemd with the units of ``deploy/systemd``, in a copy-on-write view of this machine.

Run as root, in mount, network, PID, IPC, UTS and cgroup namespaces of its own (``unshare``), as
``python -m tests.support.booted FOLDER``. The module creates a root file system and becomes its
process 1, a real systemd. systemd starts the unchanged units (a few lines below put a checkout at
``/opt/obdelta``), and :func:`drive` beside them, which acts as the administrator and as the
device. The results are in ``FOLDER/found.json``, and the output of all programs is in
``FOLDER/log``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bench.images import push
from obdelta.cli.main import main as obdelta
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.pages import blocks
from tests.support.registry import running_registry
from tests.support.server import command

ROOT = Path(__file__).parent.parent.parent
UNITS = ROOT / "deploy/systemd"
UPSTREAM_PORT = 5000
_OURS = "http://127.0.0.1:443"
_HIDDEN = ("/root", "/home", "/run/user")
"""The directories that ProtectHome= hides."""
INSTALLED = (
    "/opt/obdelta",
    "/etc/obdelta",
    "/usr/local/bin/obdelta",
    "/usr/local/share/doc/obdelta",
    "/var/lib/obdelta",
    "/var/lib/private/obdelta",
)
"""The paths that docs/systemd.md and the units make, apart from the units."""
_STUBS = ("sysinit", "basic", "sockets", "shutdown", "network-online", "multi-user")
"""Targets that would start what this machine has installed."""
_INIT = (
    *("init", "--for", "registry", "--auth", "none", "--state-dir", "/var/lib/obdelta"),
    *("--upstream", f"http://127.0.0.1:{UPSTREAM_PORT}", "--public-url", _OURS),
)


def booted(module: str, folder: Path) -> dict[str, Any]:
    """Boots a machine that a module lays out and drives. Returns what its ``drive`` found."""
    kept = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--propagation=private")
    ran = subprocess.run(
        ["unshare", *kept, "--fork", "--kill-child", sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    log = folder / "log"
    assert ran.returncode == 0, ran.stderr[-3000:] + (
        log.read_text()[-6000:] if log.exists() else ""
    )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def lay_out(folder: Path) -> Path:
    """Creates the root file system of the machine that boots."""
    root, upper = folder / "root", folder / "upper"
    for made in (root, upper, folder / "private"):
        made.mkdir()
    _mount("-t", "tmpfs", "tmpfs", upper)
    for name in ("changed", "work"):
        (upper / name).mkdir()
    _mount(
        "-t",
        "overlay",
        "-o",
        f"lowerdir=/,upperdir={upper}/changed,workdir={upper}/work",
        "overlay",
        root,
    )
    # The view has only the root file system; a tmpfs may have no user attributes.
    kept = {ROOT, Path(sys.prefix), Path(sys.base_prefix), folder}
    places: list[tuple[Path, Path]] = [
        *((each, each) for each in kept),
        (folder / "private", Path("/var/lib/private")),
    ]
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    _mount("-t", "cgroup2", "cgroup2", root / "sys/fs/cgroup")
    for name in ("dev", "run", "tmp"):
        _mount("-t", "tmpfs", "tmpfs", root / name)
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / device).touch()
        _mount("--bind", f"/dev/{device}", root / "dev" / device)
    (root / "dev/fd").symlink_to("/proc/self/fd")
    for name in ("shm", "pts"):
        (root / "dev" / name).mkdir()
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", root / "dev/pts")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    for source, place in places:
        at = root / place.relative_to("/")
        at.mkdir(parents=True, exist_ok=True)
        _mount("--bind", source, at)
    # The page installs files there; where Python is in /usr, that is this machine's own.
    local, local_work = upper / "local", upper / "local-work"
    local.mkdir()
    local_work.mkdir()
    _mount(
        "-t",
        "overlay",
        "-o",
        f"lowerdir=/usr/local,upperdir={local},workdir={local_work}",
        "overlay",
        root / "usr/local",
    )
    return root


def install(root: Path, folder: Path) -> None:
    """Installs the units, their settings, and the parts that boot."""
    units = root / "etc/systemd/system"
    for unit in UNITS.iterdir():
        (units / unit.name).write_text(unit.read_text())
    settings = root / "etc/obdelta/tap.conf"
    settings.parent.mkdir()
    # exit status 3: nothing answers yet.
    assert obdelta([*_INIT, "--output", str(settings)]) == 3
    needed = sorted({str(ROOT), sys.prefix, sys.base_prefix})
    hidden = any(place.startswith(_HIDDEN) for place in needed)
    start = re.findall(
        r"^ExecStart=/opt/obdelta/bin/twistd (.*)",
        (UNITS / "obdelta.service").read_text(),
        re.MULTILINE,
    )
    dropin = units / "obdelta.service.d/checkout.conf"
    dropin.parent.mkdir()
    dropin.write_text(
        "[Service]\nExecStart=\n"
        f"ExecStart={command()[0]} {start[0]}\n"
        f"BindReadOnlyPaths={' '.join(needed)}\n"
        f"{'ProtectHome=tmpfs' if hidden else ''}\n"
        f"StandardOutput=append:{folder}/log\nStandardError=append:{folder}/log\n"
    )
    add_driver(root, folder, "tests.support.booted")


def add_driver(root: Path, folder: Path, module: str) -> None:
    """Adds what boots: few targets, and ``python -m MODULE --drive FOLDER``. At its end the machine
    stops.
    """
    units = root / "etc/systemd/system"
    (root / "etc/nsswitch.conf").write_text(
        "passwd: files\ngroup: files\nhosts: files\n"
    )  # its dynamic users need no module
    for target in _STUBS:
        (units / f"{target}.target").write_text(
            f"[Unit]\nDescription={target}\nDefaultDependencies=no\n"
        )
    (units / "drive.service").write_text(
        f"[Unit]\nDefaultDependencies=no\nSuccessAction=exit\nFailureAction=exit\n"
        f"[Service]\nType=oneshot\nWorkingDirectory={ROOT}\n"
        f"Environment=PATH={os.environ['PATH']} HOME=/tmp\n"
        f"ExecStart={sys.executable} -m {module} --drive {folder}\n"
        f"StandardOutput=append:{folder}/log\nStandardError=append:{folder}/log\n"
    )


def drive(folder: Path) -> dict[str, Any]:
    """Installs as docs/systemd.md says, connects, updates a device by v3 and by v2, restarts,
    stops.
    """
    found: dict[str, Any] = {}
    pair = make_pair(folder / "pair")
    with running_registry(folder / "registry", port=UPSTREAM_PORT) as registry:
        for image, repository in ((pair.base, BASE_REPOSITORY), (pair.target, TARGET_REPOSITORY)):
            push(image, registry.url, repository, "latest")
        systemctl("start", "obdelta.socket")
        found["before"] = shown("ActiveState")
        found["first"] = _answer()
        found["by_ipv6"] = _answer("[::1]")
        found["shown"] = {name: shown(name) for name in ("ActiveState", "NRestarts", "DynamicUser")}
        status = Path(f"/proc/{shown('MainPID')}/status").read_text()
        for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"):
            found[name] = re.findall(rf"^{name}:\s+(\S+)", status, re.MULTILINE)[0]
        found.update(as_a_device(registry.host, folder / "work", pair.target.image_id))
        found["state"] = sorted(path.name for path in Path("/var/lib/obdelta").iterdir())
        found["private"] = oct(Path("/var/lib/private/obdelta").stat().st_mode & 0o777)
        pid = shown("MainPID")
        systemctl("reload", "obdelta.service")
        found["reloaded"] = _answer() == "ok\n" and shown("MainPID") == pid
        found["waited"] = while_it_restarts()
        systemctl("stop", "obdelta.socket", "obdelta.service")
        found["after"] = {name: shown(name) for name in ("ActiveState", "Result", "ExecMainStatus")}
        found.update(installed_and_removed())
    return found


def installed_and_removed() -> dict[str, Any]:
    """Runs the page's commands: those that install files, those that start, and those that
    remove.
    """
    page = {block.section: block.commands for block in reversed(blocks("docs/systemd.md"))}
    Path("/opt/obdelta").mkdir()  # the page makes a virtual environment there
    _, _, files = page["Install"].partition("twistd obdelta --version\n")
    assert files.startswith("mkdir -p /etc/obdelta\n")
    for commands in (files, page["Start"]):
        subprocess.run(["bash", "-ec", commands], check=True, cwd=ROOT)
    found = {"installed": [path for path in INSTALLED if os.path.lexists(path)]}
    found["enabled"] = systemctl("is-enabled", "obdelta.socket", "obdelta.service").split()
    started = _answer()
    subprocess.run(["bash", "-ec", page["Remove it"]], check=True, cwd="/")
    found["left"] = [path for path in INSTALLED if os.path.lexists(path)]
    found["left"] += map(str, Path("/etc/systemd").rglob("*obdelta*"))
    found["loaded"] = [
        systemctl("show", "--value", "--property=LoadState", f"obdelta.{kind}")
        for kind in ("socket", "service")
    ]
    return {**found, "started": started, "open": _is_open()}


def _is_open() -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", 443)) == 0


def as_a_device(registry: str, work: Path, updated: Any) -> dict[str, Any]:
    """Makes one v3 update and one v2 download."""
    http = Http(timeout=60)
    device = Device(http, Engine(http, registry=_OURS), _OURS)
    source, target = f"{registry}/{BASE_REPOSITORY}", f"{registry}/{TARGET_REPOSITORY}"
    work.mkdir()
    update = device.update(device.load_base(Reference.parse(source), work), source, target, work)
    with http.request(
        "GET", f"{_OURS}/api/v2/delta?src={source}&dest={target}&wait=true"
    ) as answer:
        location = answer.headers["location"]
    with http.request("GET", location) as answer:
        v2 = b"".join(answer.chunks())
    return {
        "is_delta": update.is_delta,
        "updated": update.image_id == updated,
        "v2_version": json.loads(v2[: v2.index(0)])["version"],
        "v2_full_pull": "full-pull" in location,
    }


def while_it_restarts() -> str:
    """Checks that a connection between the old process's end and the new one's start is not
    refused.
    """
    systemctl("stop", "obdelta.service")
    answers: list[str] = []
    with socket.create_connection(("127.0.0.1", 443), timeout=60) as early:
        early.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        asking = threading.Thread(target=lambda: answers.append(_answer()))
        asking.start()
        with early.makefile("rb") as answer:
            answers.append(answer.read().rpartition(b"\r\n")[2].decode())
        asking.join()
    return ",".join(answers)


def _answer(host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:443/healthz", timeout=20) as answer:
        return str(answer.read().decode())


def systemctl(*arguments: str) -> str:
    """Returns what systemctl prints; raises CalledProcessError if it fails."""
    return subprocess.run(
        ["systemctl", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def shown(name: str) -> str:
    """Returns a property of the service."""
    return systemctl("show", "--value", f"--property={name}", "obdelta.service")


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *(str(argument) for argument in arguments)], check=True)


def driven(folder: Path, drive: Callable[[Path], dict[str, Any]]) -> None:
    """Writes what ``drive`` found."""
    found = None
    try:
        found = drive(folder)
    finally:
        if found is None:
            subprocess.run(
                ["systemctl", "status", "--no-pager", "obdelta.service", "obdelta.socket"],
                check=False,
            )
    (folder / "found.json").write_text(json.dumps(found))


def boot(root: Path) -> NoReturn:
    """Becomes process 1 of the machine."""
    old = root / "mnt"
    subprocess.run(["pivot_root", root, old], check=True)
    os.chdir("/")
    subprocess.run(["umount", "--lazy", "/mnt"], check=True)
    systemd = "/lib/systemd/systemd"
    options = ("--system", "--unit=drive.service", "--log-target=null", "--show-status=no")
    os.execve(systemd, [systemd, *options], {"PATH": os.environ["PATH"], "container": "test"})


def main(install: Callable[[Path, Path], None], drive: Callable[[Path], dict[str, Any]]) -> None:
    """Boots, or with ``--drive`` runs the service that drives the test."""
    folder = Path(sys.argv[-1])
    if sys.argv[1] == "--drive":
        driven(folder, drive)
        return
    root = lay_out(folder)
    install(root, folder)
    boot(root)


if __name__ == "__main__":
    main(install, drive)
