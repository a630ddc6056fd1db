"""Two fleets on one server: one attacks, the other updates.

The server builds one delta at a time. So the order of builds in its log shows how many came before
the other fleet's own.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from obdelta.device.http import Http, ServerFault
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Reference
from tests.support.fault_fleet import repository
from tests.support.server import RunningServer
from tests.support.tokens import Issuer, pulls

HOSTILE_IMAGES = 12
PATIENCE = 120.0
PAUSE = 0.1
"""Seconds between two requests of an attacking thread that does not wait for answers: the rate of
the attack.
"""
DELTAS = re.compile(
    r"build: pair=(?P<kind>v\d) (?P<base>\S+)@\S+ -> (?P<target>\S+)@\S+(?: form=\S+)?"
    r" outcome=(?P<outcome>\S+)"
)
SECONDS = re.compile(r" seconds=(?P<seconds>[0-9.]+)")


@dataclass(frozen=True)
class Built:
    """A log line about a finished build. ``began``: when it was queued; both times in seconds."""

    target: str
    began: float
    ended: float


@dataclass
class Tenants:
    """A server and its registry; the hostile fleet has the repositories in ``hostile``."""

    server: RunningServer
    registry: str
    issuer: Issuer
    hostile: Sequence[str]
    trap: socket.socket
    """A listener that no program of the server should connect to."""
    repositories: Path
    """The directory of repositories on the registry's disk."""
    stop: threading.Event = field(default_factory=threading.Event)

    def token(self, subject: str, *repositories: str) -> str:
        return self.issuer.token(pulls(*repositories), subject=subject)

    def host(self) -> str:
        return self.server.host

    def built(self) -> list[Built]:
        """Returns the finished builds, in that order."""
        found = []
        for line in self.server.log.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                match, seconds = DELTAS.search(event["message"]), SECONDS.search(event["message"])
                if match and seconds:
                    ended = datetime.fromisoformat(event["time"]).timestamp()
                    found.append(Built(match["target"], ended - float(seconds["seconds"]), ended))
        return found

    def ask(
        self, subject: str, base: str, target: str, version: int = 3, timeout: float = 60.0
    ) -> int:
        """Sends one delta request; returns its status, 0 without an answer."""
        host = self.host()
        url = f"{self.server.url}/api/v{version}/delta?src={host}/{base}&dest={host}/{target}"
        headers = {"Authorization": f"Bearer {self.token(subject, base, target)}"}
        try:
            with Http(timeout=timeout).request("GET", url, headers) as answer:
                return answer.status
        except (ServerFault, OSError):
            return 0

    def ask_and_pull(
        self, subject: str, base: str, target: str, *, layers: bool, timeout: float = 3.0
    ) -> None:
        """Sends one v3 delta request, and fetches the manifest and the layers of its answer."""
        host = self.host()
        headers = {"Authorization": f"Bearer {self.token(subject, base, target)}"}
        http, url = Http(timeout=timeout), self.server.url
        with contextlib.suppress(ServerFault, OSError, ValueError, KeyError):
            names = f"src={host}/{base}&dest={host}/{target}"
            with http.request("GET", f"{url}/api/v3/delta?{names}", headers) as answer:
                tag = json.loads(answer.small(1 << 20))["name"].rpartition(":")[2]
            with http.request("GET", f"{url}/v2/{target}/manifests/{tag}", headers) as answer:
                manifest = json.loads(answer.small(1 << 20))
            for layer in manifest["layers"] if layers else []:
                path = f"/v2/{target}/blobs/{layer['digest']}"
                with http.request("GET", url + path, headers) as answer:
                    next(answer.chunks(), b"")

    def trapped(self) -> int:
        """Returns the number of connections to the trap."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.trap.accept()[0].close()
                found += 1
        return found

    def update(self, number: int, subject: str) -> bool:
        """Updates a device of the other fleet from image ``number`` to the next one, verified to
        the last byte.
        """
        base, target = repository(number), repository(number + 1)
        token, http = self.token(subject, base, target), Http(timeout=60)
        direct = Engine(http, registry=self.registry)
        with TemporaryDirectory() as folder:
            loaded = Device(http, direct, self.server.url).load_base(
                Reference("", base), Path(folder)
            )
            device = Device(http, Engine(http, token=token), self.server.url, token=token)
            names = [f"{self.host()}/{name}" for name in (base, target)]
            return device.update(loaded, names[0], names[1], Path(folder), PATIENCE).is_delta
