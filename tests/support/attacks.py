"""Attacks of one fleet on another that shares its server: what the threads do, and the images."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.images import file, make_image, make_layer, push, symlink
from tests.support.fault_fleet import make_fleet
from tests.support.tenants import HOSTILE_IMAGES, PAUSE, Tenants

Attack = Callable[[Tenants, int], None]
"""One round of a thread of the hostile fleet, which repeats it until ``stop`` is set."""


def ask_for_all_pairs(tenants: Tenants, thread: int) -> None:
    """Requests every pair of the fleet's images, v2 and v3, as one subject."""
    pairs = list(itertools.permutations(tenants.hostile, 2))
    for base, target in itertools.islice(itertools.cycle(pairs), thread * 17, None):
        if tenants.stop.is_set():
            return
        tenants.ask("d_hostile", base, target, 2 + thread % 2, 3.0)


def ask_as_many_devices(tenants: Tenants, thread: int) -> None:
    """Requests every pair, each time as a new device of the fleet."""
    pairs = list(itertools.permutations(tenants.hostile, 2))
    for number, (base, target) in enumerate(
        itertools.islice(itertools.cycle(pairs), thread * 17, None)
    ):
        if tenants.stop.is_set():
            return
        tenants.ask(f"d_{thread}_{number}", base, target, 3 - thread % 2, 3.0)


def send_what_is_no_request(tenants: Tenants, thread: int) -> None:
    """Sends malformed requests: two Host headers, none, folded lines, a fragment, bytes of TLS,
    and half a request on an open connection.
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
    """Requests blobs with odd queries and ranges, reads little or nothing, and disconnects."""
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


def fill_the_store(tenants: Tenants, thread: int) -> None:
    """Requests every delta as new devices, and fetches its manifest, which protects it from
    eviction.
    """
    _pull_all(tenants, thread, layers=False)


def pull_evicted_layers(tenants: Tenants, thread: int) -> None:
    """Requests every delta as new devices, and pulls evicted layers, so that each is rebuilt."""
    _pull_all(tenants, thread, layers=True)


def _pull_all(tenants: Tenants, thread: int, *, layers: bool) -> None:
    pairs = list(itertools.permutations(tenants.hostile, 2))
    for number, (base, target) in enumerate(
        itertools.islice(itertools.cycle(pairs), thread * 5, None)
    ):
        if tenants.stop.is_set():
            return
        tenants.ask_and_pull(f"d_{thread}_{number}", base, target, layers=layers)


def delete_and_restore(tenants: Tenants, thread: int) -> None:
    """Removes layers of the fleet's own images from the registry, and restores them."""
    gone = False
    while not tenants.stop.is_set() or gone:
        for name in tenants.hostile:
            links = tenants.repositories / name / "_layers"
            ends = [links, links.with_name("gone")]
            with contextlib.suppress(OSError):
                ends[gone].rename(ends[not gone])
        gone = not gone
        time.sleep(PAUSE * 5)


def name_other_hosts(tenants: Tenants, thread: int) -> None:
    """Sends names of other hosts, passwords, and names that would forge log lines."""
    trap = ":".join(map(str, tenants.trap.getsockname()))
    name = tenants.hostile[thread % len(tenants.hostile)]
    own = f"{tenants.host()}/{name}"
    bearer = f"Bearer {tenants.token('d_hostile', name, f'{trap}/{name}')}"
    requests = [
        f"/api/v3/delta?src={trap}/{name}&dest={trap}/{name}",
        f"/api/v2/delta?src=http://{trap}/{name}&dest={own}",
        f"/api/v3/delta?src={own}&dest={own}%00%1b[31m%0aforged",
        f"/api/v3/delta?src=169.254.169.254/{name}&dest={own}",
        f"/v2/{trap}/{name}/manifests/latest",
        f"/v2/{name}/manifests/latest?ns={trap}",
        f"/v2/{name}/tags/list?last=%0d%0aX-Forged:%201%1b[2J",
        f"//{trap}/v2/",
    ]
    logins = [bearer, "Basic ZF9ob3N0aWxlOnBhc3N3b3Jk", "Bearer \x1b[31mred"]
    for path, login in itertools.cycle(itertools.product(requests, logins)):
        if tenants.stop.is_set():
            return
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", tenants.server.port), 5) as connection,
        ):
            connection.settimeout(5)
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: {trap}\r\nX-Forwarded-Host: {trap}\r\n"
                f"User-Agent: \x1b[2J\r\nAuthorization: {login}\r\n\r\n".encode()
            )
            connection.recv(1000)
        time.sleep(PAUSE / 4)


def make_ordinary(directory: Path, registry: str, names: Sequence[str]) -> None:
    """Pushes images that differ in a few bytes."""
    for number, name in enumerate(names):
        content = [
            file("app/data", bytes(range(256)) * 200 + b"%d" % number),
            file("n", b"%d" % number),
        ]
        layer = make_layer(content, directory / "blobs")
        push(make_image([layer], directory / "image"), registry, name)


NOISE = 60_000


def make_noise(directory: Path, registry: str, names: Sequence[str]) -> None:
    """Pushes images that have nothing in common: each delta is as large as its target."""
    source = random.Random(4)
    for name in names:
        layer = make_layer([file("bin/program", source.randbytes(NOISE))], directory / "blobs")
        push(make_image([layer], directory / "image"), registry, name)


def make_copies(directory: Path, registry: str, names: Sequence[str]) -> None:
    """Pushes the other fleet's images into the hostile fleet's repositories."""
    make_fleet(directory, registry, len(names), names=names.__getitem__)


def make_long_work(directory: Path, registry: str, names: Sequence[str]) -> None:
    """Pushes small images that take long to process: names that differ only in digits, a directory
    twice, long runs, many equal files.
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


@dataclass(frozen=True)
class Plan:
    """An attack. ``threads``: functions that its threads run. ``begun``: builds of the hostile
    fleet that end before the first update of the other fleet. ``push`` makes the hostile images,
    and ``options`` are settings of the server.
    """

    threads: Sequence[Attack]
    begun: int = 0
    push: Callable[[Path, str, Sequence[str]], None] = make_ordinary
    images: int = HOSTILE_IMAGES
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def keeps_building(self) -> bool:
        """Whether its builds never end."""
        return self.begun > 1


PASSWORD = "the-password-of-the-builder"


ATTACKS: dict[str, Plan] = {
    "one subject, all pairs": Plan([ask_for_all_pairs] * 20, 3),
    "many devices, all pairs": Plan([ask_as_many_devices] * 20, 3),
    "small images, long work": Plan([ask_as_many_devices] * 20, 3, push=make_long_work, images=6),
    "malformed requests": Plan([send_what_is_no_request] * 6),
    "stalls and departures": Plan([stall_and_leave] * 6),
    "abandoned requests": Plan([abandon_requests]),
    "a full store": Plan(
        [fill_the_store] * 10,
        16,
        push=make_noise,
        options={"store_quota": str(6 * NOISE)},
    ),
    "evicted layers": Plan(
        [pull_evicted_layers] * 10,
        16,
        push=make_noise,
        options={"store_quota": str(2 * NOISE), "keep_served": "1"},
    ),
    "deleted images with equal contents": Plan(
        [ask_as_many_devices] * 6 + [delete_and_restore], 16, push=make_copies
    ),
    "other hosts, forged logs": Plan(
        [name_other_hosts] * 6,
        options={"upstream_credentials": "builder"},
    ),
    "all at once": Plan(
        [ask_for_all_pairs] * 8
        + [ask_as_many_devices] * 8
        + [send_what_is_no_request, stall_and_leave] * 3,
        3,
    ),
}


NO_ATTACK = Plan([])
