"""The file in ``state-dir`` that names the running server's operators' endpoint, for commands."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from twisted.internet.interfaces import IListeningPort

NAME: Final = "operator-address"
_LOCAL: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound
"""The address by which this machine reaches a port of all addresses."""


def record(state_dir: Path, ports: Iterable[IListeningPort]) -> Callable[[], None]:
    """Writes the address of the first port that commands can use, and returns the removal of the
    file. Without the file, commands use the setting ``operator-listen``.
    """
    addresses = [address for port in ports if (address := address_of(port)) is not None]
    path = state_dir / NAME
    if not addresses:
        path.unlink(missing_ok=True)
        return lambda: None
    content = {"pid": os.getpid(), "started": _started(os.getpid()), "address": addresses[0]}
    new = path.with_name(f"{NAME}.new")
    try:
        new.write_text(json.dumps(content) + "\n", "utf-8")
        new.replace(path)
    except OSError as error:  # a full disk must not keep a server from starting
        from twisted.logger import Logger

        Logger().warn("{name} was not written: {reason}", name=NAME, reason=error.strerror)

    def remove() -> None:
        with contextlib.suppress(OSError):  # the process ends, and the file is stale then
            path.unlink(missing_ok=True)

    return remove


def find(state_dir: Path) -> str | None:
    """Returns the address that a running server recorded: ``http://HOST:PORT`` or ``unix:PATH``.

    None if no server runs, or if this user may not read the file. A server that was killed
    leaves the file behind; its process is gone then, or is another one.
    """
    try:
        content = json.loads((state_dir / NAME).read_text("utf-8"))
        running = _started(content["pid"]) == content["started"] is not None
        return str(content["address"]) if running else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def address_of(port: IListeningPort) -> str | None:
    """Returns a port's address as commands take it, None for other kinds."""
    # Here, since commands also import this module, and Twisted is slow to import.
    from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress

    host = port.getHost()
    if isinstance(host, UNIXAddress):
        return f"unix:{Path(os.fsdecode(host.name)).absolute()}" if host.name else None
    if isinstance(host, IPv4Address | IPv6Address):
        return url_of(host.host, host.port)
    return None


def url_of(host: str, port: int | str) -> str:
    """Returns the URL by which this machine reaches a TCP port that listens at ``host``."""
    name = _LOCAL.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _started(pid: int) -> int | None:
    """Returns the time at which a process started, in ticks since the boot (proc(5), field 22 of
    ``stat``). None if there is no such process.
    """
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text("ascii", "replace")
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
