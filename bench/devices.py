"""Many devices in one process: ``python -m bench.devices`` reads a :class:`Herd` as JSON and writes
what came of it.

Each device asks for its delta and pulls it as balena-engine does: one thing after another, a new
TLS connection each, all bytes hashed and none kept. A device is a generator that yields what its
socket must become; one selector drives them all, so that 2,000 of them cost this process little
more than their bytes.
"""

from __future__ import annotations

import hashlib
import json
import resource
import selectors
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obdelta.oci.manifest import ACCEPT

_RECEIVE = 64 * 1024
"""A device's own buffer in the kernel: what a slow one leaves with the server, not with the
network.
"""
_MAX_HEADER = 64 * 1024
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_CHUNK = memoryview(bytearray(256 * 1024))
"""One for all: a device has hashed what is in it before another one runs."""


@dataclass(frozen=True, slots=True)
class Herd:
    """``tokens``: one a device. ``question``: path and query. ``ca``: PEM file. ``name`` is the
    server's in its certificate.
    """

    port: int
    name: str
    ca: str
    question: str
    tokens: list[str]
    seconds: float


@dataclass(slots=True)
class Outcome:
    """``verified``: devices that have every blob of a delta, each with its digest. ``retried``:
    questions once more after 502 or 504. ``pulled_again``: whole pulls, ``resumed``: layers, once
    more after a dropped connection or such an answer.
    """

    verified: int = 0
    retried: int = 0
    pulled_again: int = 0
    resumed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    names: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)


class Dropped(Exception):
    """A connection that was not made, or broke off."""


class Refused(Exception):
    """An answer that no device can go on with."""


Step = Generator[int, None, Any]


class _Device:
    """One of them. ``socket`` is what it waits for now."""

    def __init__(self, number: int, herd: Herd, tls: ssl.SSLContext, outcome: Outcome) -> None:
        self._herd, self._tls, self._outcome = herd, tls, outcome
        self._token = herd.tokens[number]
        # An address for every few hundred, as behind so many routers.
        self._source = f"127.0.{1 + number // 200}.{1 + number % 200}"
        self.socket: socket.socket | None = None

    def run(self) -> Step:
        """From the question to the last layer, as often as it takes: a supervisor asks and pulls
        again after any trouble.
        """
        while True:
            try:
                name = yield from self._pull()
            except Dropped as error:
                self._outcome.pulled_again += 1
                self._outcome.drops[str(error)] = self._outcome.drops.get(str(error), 0) + 1
            else:
                self._outcome.verified += 1
                self._outcome.names[name] = self._outcome.names.get(name, 0) + 1
                return

    def _pull(self) -> Step:
        body = yield from self._whole(self._herd.question)
        name = json.loads(body)["name"]
        repository, _, tag = name.partition("/")[2].rpartition(":")
        yield from self._whole("/v2/")
        _, headers, _ = yield from self._get(f"/v2/{repository}/manifests/{tag}", "HEAD")
        digest = headers.get("docker-content-digest", "")
        raw = yield from self._whole(f"/v2/{repository}/manifests/{digest}")
        if "sha256:" + hashlib.sha256(raw).hexdigest() != digest:
            raise Refused("another manifest than was promised")
        manifest = json.loads(raw)
        for part in [manifest["config"], *manifest["layers"]]:
            yield from self._layer(f"/v2/{repository}/blobs/{part['digest']}", part)
        return name

    def _layer(self, path: str, part: Mapping[str, Any]) -> Step:
        while True:  # an engine tries layers without limit
            try:
                status, _, _ = yield from self._get(path, expected=part)
            except Dropped:
                self._outcome.resumed += 1
            else:
                if status != 200:
                    raise Refused(f"a blob: {status}")
                return

    def _whole(self, path: str) -> Step:
        while True:
            status, _, body = yield from self._get(path)
            if status not in (502, 504):
                break
            self._outcome.retried += 1
        if status != 200:
            raise Refused(f"{path.partition('?')[0]}: {status}")
        return body

    def _get(
        self, path: str, method: str = "GET", expected: Mapping[str, Any] | None = None
    ) -> Step:
        """Status, headers, body; with ``expected`` (a descriptor) the body is compared with it and
        not kept.
        """
        plain = socket.socket()
        plain.setblocking(False)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE)
        self.socket = plain
        try:
            plain.bind((self._source, 0))
            plain.connect_ex(("127.0.0.1", self._herd.port))
            yield _WRITE
            if plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise Dropped("no connection")
            secure = self._tls.wrap_socket(
                plain, server_hostname=self._herd.name, do_handshake_on_connect=False
            )
            self.socket = secure
            while (wanted := _handshake(secure)) is not None:
                yield wanted
            request = (
                f"{method} {path} HTTP/1.1\r\nHost: {self._herd.name}\r\nConnection:"
                f" close\r\nAuthorization: Bearer {self._token}\r\nAccept:"
                f" {', '.join(ACCEPT)}\r\nAccept-Encoding: identity\r\nUser-Agent: bench\r\n\r\n"
            )
            secure.send(request.encode())
            head, rest = yield from self._head(secure)
            status, headers = _parsed(head)
            length = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
            if expected is not None and status == 200:
                yield from self._hashed(secure, rest, length, expected)
                return status, headers, b""
            body = bytearray(rest)
            while len(body) < length:
                body += _CHUNK[: (yield from self._received(secure))]
            return status, headers, bytes(body)
        except (ConnectionError, ssl.SSLZeroReturnError, ssl.SSLEOFError) as error:
            url = path.partition("?")[0].rpartition("/")[0]
            raise Dropped(f"{method} {url}: {type(error).__name__} {error}") from error
        finally:
            self.socket.close()

    def _head(self, secure: ssl.SSLSocket) -> Step:
        found = bytearray()
        while (end := found.find(b"\r\n\r\n")) < 0:
            if len(found) > _MAX_HEADER:
                raise Refused("headers without an end")
            found += _CHUNK[: (yield from self._received(secure))]
        return bytes(found[:end]), bytes(found[end + 4 :])

    def _hashed(
        self, secure: ssl.SSLSocket, rest: bytes, length: int, expected: Mapping[str, Any]
    ) -> Step:
        digest, size = hashlib.sha256(rest), len(rest)
        while size < length:
            count = yield from self._received(secure)
            digest.update(_CHUNK[:count])
            size += count
        self._outcome.bytes += size
        if size != expected["size"] or f"sha256:{digest.hexdigest()}" != expected["digest"]:
            raise Refused("a blob that is not what the manifest says")

    def _received(self, secure: ssl.SSLSocket) -> Step:
        while True:
            try:
                count = secure.recv_into(_CHUNK)
            except ssl.SSLWantReadError:
                yield _READ
            else:
                if not count:
                    raise Dropped("the connection was closed in the middle of an answer")
                return count


def _handshake(secure: ssl.SSLSocket) -> int | None:
    try:
        secure.do_handshake()
    except ssl.SSLWantReadError:
        return _READ
    except ssl.SSLWantWriteError:
        return _WRITE
    return None


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return int(first.split()[1]), headers


def run(herd: Herd) -> Outcome:
    """Runs all devices at once. Those not done after ``herd.seconds`` are stopped and counted."""
    outcome, errors = Outcome(), Counter[str]()
    tls = ssl.create_default_context(cafile=herd.ca)
    selector = selectors.DefaultSelector()
    began = time.monotonic()
    left = 0

    def advance(device: _Device, step: Step) -> None:
        nonlocal left
        try:
            wanted = next(step)
        except StopIteration:
            left -= 1
            return
        except (OSError, Refused, ValueError, KeyError) as error:
            left -= 1
            errors[f"{type(error).__name__}: {error}"] += 1
            return
        assert device.socket is not None
        selector.register(device.socket, wanted, (device, step))

    for number in range(len(herd.tokens)):
        device = _Device(number, herd, tls, outcome)
        left += 1
        advance(device, device.run())
    while left and time.monotonic() - began < herd.seconds:
        for key, _ in selector.select(1.0):
            selector.unregister(key.fileobj)
            advance(*key.data)
    outcome.seconds = time.monotonic() - began
    if left:
        errors[f"not done after {herd.seconds:g} s"] += left
    outcome.errors = dict(errors)
    return outcome


def main() -> None:
    """One herd."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    herd = Herd(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
    json.dump(asdict(run(herd)), sys.stdout)


if __name__ == "__main__":
    main()
