"""Two fleets on one server: one attacks, the other updates.

The server builds one delta at a time, so that the order of builds in its log tells how many were
let through before the other fleet's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.images import file, make_image, make_layer, push, symlink
from bench.registry import serving
from obdelta.device import Device, Engine, Http
from obdelta.errors import ServerFault
from obdelta.oci import Reference
from tests.support.fault_fleet import Tally, make_fleet, repository
from tests.support.server import RunningServer, running_server
from tests.support.tokens import Issuer, pulls

HOSTILE_IMAGES = 12
PATIENCE = 120.0
PAUSE = 0.1
"""Seconds between two requests of a thread that attacks without waiting for answers: the rate of
the attack.
"""
DELTAS = re.compile(
    r"build: pair=(?P<kind>v\d) (?P<base>\S+)@\S+ -> (?P<target>\S+)@\S+ outcome=(?P<outcome>\S+)"
)
SECONDS = re.compile(r" seconds=(?P<seconds>[0-9.]+)")


@dataclass(frozen=True)
class Built:
    """A line of the log: a build that ended. ``began``: when it was queued; both in seconds."""

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
    stop: threading.Event = field(default_factory=threading.Event)

    def token(self, subject: str, *repositories: str) -> str:
        return self.issuer.token(pulls(*repositories), subject=subject)

    def host(self) -> str:
        return self.server.host

    def built(self) -> list[Built]:
        """Builds that have ended, in that order."""
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
        """One delta request; its status, 0 where there was none."""
        host = self.host()
        url = f"{self.server.url}/api/v{version}/delta?src={host}/{base}&dest={host}/{target}"
        headers = {"Authorization": f"Bearer {self.token(subject, base, target)}"}
        try:
            with Http(timeout=timeout).ask("GET", url, headers) as answer:
                return answer.status
        except (ServerFault, OSError):
            return 0

    def update(self, number: int, subject: str) -> bool:
        """A device of the other fleet, from image ``number`` to the next one: verified to the last
        byte.
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


Attack = Callable[[Tenants, int], None]
"""What one thread of the hostile fleet does, again and again, until ``stop`` is set."""


def ask_for_all_pairs(tenants: Tenants, thread: int) -> None:
    """One subject with every pair of the fleet's images, v2 and v3."""
    pairs = list(itertools.permutations(tenants.hostile, 2))
    for base, target in itertools.islice(itertools.cycle(pairs), thread * 17, None):
        if tenants.stop.is_set():
            return
        tenants.ask("d_hostile", base, target, 2 + thread % 2, 3.0)


def ask_as_many_devices(tenants: Tenants, thread: int) -> None:
    """Every question comes from a new device of the fleet."""
    pairs = list(itertools.permutations(tenants.hostile, 2))
    for number, (base, target) in enumerate(
        itertools.islice(itertools.cycle(pairs), thread * 17, None)
    ):
        if tenants.stop.is_set():
            return
        tenants.ask(f"d_{thread}_{number}", base, target, 3 - thread % 2, 3.0)


def send_what_is_no_request(tenants: Tenants, thread: int) -> None:
    """Two Host headers, none, folded lines, a fragment, bytes of TLS, half a request that stays
    open.
    """
    host = tenants.host()
    lines = [
        f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\nHost: other\r\n\r\n",
        "GET /v2/ HTTP/1.1\r\n\r\n",
        f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\nX: a\r\n b\r\n\r\n",
        f"GET /v2/#x HTTP/1.1\r\nHost: {host}\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00",
        f"POST /v2/ HTTP/1.1\r\nHost: {host}\r\nContent-Length: 999999999\r\n\r\n",
        (
            f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer a\r\nAuthorization: Bearer"
            " b\r\n\r\n"
        ),
        f"GET /v2/ HTTP/1.1\r\nHost: {host}\r\nX-Half: ",
    ]
    held: list[socket.socket] = []
    for line in itertools.cycle(lines):
        if tenants.stop.is_set():
            break
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", tenants.server.port), 5)
            connection.settimeout(1)
            connection.sendall(line.encode("latin-1"))
            held.append(connection)
        time.sleep(PAUSE)
        while len(held) > 8:
            held.pop(0).close()
    for connection in held:
        connection.close()


def stall_and_leave(tenants: Tenants, thread: int) -> None:
    """Asks for blobs with odd queries and ranges, reads a little or nothing, and leaves."""
    name = tenants.hostile[thread % len(tenants.hostile)]
    token = tenants.token("d_hostile", name)
    for number in itertools.count():
        if tenants.stop.is_set():
            return
        path = (
            f"/v2/{name}/"
            + ("tags/list" if number % 2 else "manifests/latest")
            + f"?n={number}&x={'y' * 200}"
        )
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", tenants.server.port), 5)
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: {tenants.host()}\r\nAuthorization: Bearer"
                f" {token}\r\n\r\n".encode()
            )
            time.sleep(PAUSE)
            connection.close()


def abandon_requests(tenants: Tenants, thread: int) -> None:
    """Sends requests as fast as it can, and resets each connection at once."""
    name = tenants.hostile[thread % len(tenants.hostile)]
    request = (
        f"GET /v2/{name}/manifests/latest HTTP/1.1\r\nHost: {tenants.host()}\r\n"
        f"Authorization: Bearer {tenants.token('d_hostile', name)}\r\n\r\n"
    ).encode()
    while not tenants.stop.is_set():
        with contextlib.suppress(OSError), socket.socket() as connection:
            connection.settimeout(5)
            connection.connect(("127.0.0.1", tenants.server.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request)


def make_long_work(directory: Path, registry: str, names: Sequence[str]) -> None:
    """Pushes small images that are much work: names that differ only in digits, a folder twice,
    long runs, many equal files.
    """
    blobs = directory / "blobs"
    for number, name in enumerate(names):
        entries = [
            file(f"frames/{number}/f{frame:07}.jpg", frame.to_bytes(4, "big"))
            for frame in range(1000)
        ]
        entries += [
            symlink(f"link{number}", f"frames/{number}"),
            file("zeros", bytes((2 << 20) + number)),
        ]
        entries += [file(f"same/{copy}", b"x" * 4000 + bytes([number])) for copy in range(100)]
        push(make_image([make_layer(entries, blobs, level=9)], directory / "image"), registry, name)


ATTACKS: dict[str, Sequence[Attack]] = {
    "one subject, all pairs": [ask_for_all_pairs] * 20,
    "many devices, all pairs": [ask_as_many_devices] * 20,
    "small images, long work": [ask_as_many_devices] * 20,
    "malformed requests": [send_what_is_no_request] * 6,
    "stalls and departures": [stall_and_leave] * 6,
    "abandoned requests": [abandon_requests],
    "all at once": (
        [ask_for_all_pairs] * 8
        + [ask_as_many_devices] * 8
        + [send_what_is_no_request, stall_and_leave] * 3
    ),
}
BUILDING = frozenset(
    name for name, attack in ATTACKS.items() if ask_as_many_devices in attack or "pairs" in name
)
"""Attacks that keep the queue full."""


@contextmanager
def two_fleets(
    directory: Path, updates: int, *, long_work: bool = False, **options: str
) -> Iterator[Tenants]:
    """A server that asks for tokens, before a real registry with the images of both fleets."""
    issuer = Issuer()
    given: dict[str, Any] = {
        "max_builds": "1",
        "effort": "fast",
        "worth": "10",
        "log_format": "json",
        **options,
    }
    with serving(directory / "registry") as registry:
        make_fleet(directory / "ours", registry, updates + 1)
        hostile = [f"v2/{number:032x}" for number in range(0xBAD00, 0xBAD00 + HOSTILE_IMAGES)]
        if long_work:
            hostile = hostile[:6]
            make_long_work(directory / "theirs", registry, hostile)
        else:
            for number, name in enumerate(hostile):
                content = [
                    file("app/data", bytes(range(256)) * 200 + b"%d" % number),
                    file("n", b"%d" % number),
                ]
                layer = make_layer(content, directory / "theirs" / "blobs")
                push(make_image([layer], directory / "theirs" / "image"), registry, name)
        with running_server(
            directory / "state",
            upstream=registry,
            auth="token",
            auth_key=str(issuer.write(directory)),
            auth_issuer=issuer.issuer,
            auth_audience=issuer.audience,
            auth_realm="https://api.example.com/auth/v1/token",
            upstream_credentials="none",
            **given,
        ) as server:
            yield Tenants(server, registry, issuer, hostile)


@dataclass(frozen=True)
class Passed:
    """What happened to one update. ``before``: hostile builds that ended between its build's
    queueing and its end.
    """

    seconds: float
    before: int


def attacked(tenants: Tenants, attack: str, updates: int, tally: Tally) -> list[Passed]:
    """The other fleet updates so many times, each time by another device, while the attack goes on
    (none: in peace).
    """
    threads = [
        threading.Thread(target=one, args=(tenants, number), daemon=True)
        for number, one in enumerate(ATTACKS.get(attack, []))
    ]
    for thread in threads:
        thread.start()
    passed = []
    try:
        if attack in BUILDING:
            deadline = time.monotonic() + PATIENCE
            while len(tenants.built()) < 3:
                assert time.monotonic() < deadline, "the attack does not begin"
                time.sleep(0.05)  # polled: it is another process's business
        for number in range(updates):
            began = time.monotonic()
            assert tenants.update(number, f"d_ours_{number}"), "the device was led to a full pull"
            seconds = time.monotonic() - began
            built = tenants.built()
            (own,) = [one for one in built if one.target == repository(number + 1)]
            before = sum(
                own.began < one.ended < own.ended for one in built if one.target in tenants.hostile
            )
            passed.append(Passed(seconds, before))
    finally:
        tenants.stop.set()
        for thread in threads:
            thread.join(90)
    tally.add("hostile builds that were done meanwhile", len(tenants.built()) - updates)
    return passed
