"""A double of openBalena's API: its OData resources for releases and devices, over real HTTP.

The real one needs PostgreSQL, Redis and hundreds of npm packages. Names of resources, fields and
relations, the form of answers (``{"d": […]}``), filters, ``$expand`` with ``/$count``, and what a
guest sees with a missing or wrong token are those of open-balena-api 49.0.12. That one was run with
PostgreSQL 15 and Redis 7, and :class:`obdelta.fleet.releases.FleetReader` read the same from both
in 51 calls: of five releases of two services, one of them a draft; of three devices, one of them
pinned; of one installed image, and one deleted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from obdelta.fleet import api_client
from obdelta.registry.requests import Backoff
from tests.support.odata_filter import Filter, Row

TOKEN = "the-api-key-of-obdelta"


@dataclass
class Answer:
    """An answer instead of the real one."""

    status: int
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


class OpenBalenaApi:
    """Tables, and what refers to what. Tests change rows while it runs. ``requests`` are the paths
    that came, with their queries; ``tokens`` those that are accepted. ``instead`` may answer.
    """

    def __init__(self, registry: str = "registry.example.com") -> None:
        self.registry, self.url = registry, ""
        self.tokens = {TOKEN}
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []
        self.instead: Callable[[str], Answer | None] = lambda _path: None
        self.tables: dict[str, dict[int, Row]] = {
            name: {}
            for name in (
                "application", "service", "release", "image", "release_image", "device",
                "image_install",
            )
        }  # fmt: skip
        self._next = 0

    # -- rows

    def add(self, table: str, **row: Any) -> int:
        """Adds a row and returns its ID."""
        self._next += 1
        self.tables[table][self._next] = {"id": self._next, **row}
        return self._next

    def application(self, name: str = "acme", *, host: bool = False) -> int:
        """Adds a fleet."""
        return self.add(
            "application",
            app_name=name,
            slug=f"org/{name}",
            is_of__class="fleet",
            is_host=host,
            should_be_running__release=None,
        )

    def release(
        self,
        application: int,
        images: dict[str, tuple[str, str | None]],
        *,
        version: str = "1.0.0",
        commit: str = "c0ffee",
        finalized: datetime | None = None,
        draft: bool = False,
        status: str = "success",
    ) -> int:
        """Adds a release: for each service the repository and the digest of its image."""
        when = finalized or datetime.now(UTC)
        release = self.add(
            "release",
            application=application,
            commit=commit,
            raw_version=version,
            status=status,
            is_invalidated=False,
            is_finalized_at__date=None if draft else iso(when),
            update_timestamp=iso(when),
        )
        for service, (repository, digest) in images.items():
            image = self.add(
                "image",
                is_stored_at__image_location=f"{self.registry}/{repository}",
                content_hash=digest,
                service=self._service(application, service),
            )
            self.add("release_image", release=release, image=image)
        return release

    def _service(self, application: int, name: str) -> int:
        for row in self.tables["service"].values():
            if (row["application"], row["service_name"]) == (application, name):
                return int(row["id"])
        return self.add("service", application=application, service_name=name)

    def devices(self, release: int, count: int = 1) -> list[int]:
        """Adds devices that run a release, with its images installed."""
        application = self.tables["release"][release]["application"]
        found = []
        for _ in range(count):
            device = self.add(
                "device", application=application, running=release, pinned=None, is_online=True
            )
            found.append(device)
            for one in list(self.tables["release_image"].values()):
                if one["release"] == release:
                    self.add("image_install", device=device, image=one["image"], status="Running")
        return found

    def delete_release(self, release: int) -> None:
        """Deletes a release and its images, as the API's cascade does."""
        del self.tables["release"][release]
        for id_, row in list(self.tables["release_image"].items()):
            if row["release"] == release:
                del self.tables["release_image"][id_]
                self.tables["image"].pop(row["image"], None)
                for install, installed in list(self.tables["image_install"].items()):
                    if installed["image"] == row["image"]:
                        del self.tables["image_install"][install]
        for row in self.tables["device"].values():
            if row["running"] == release:
                row["running"] = None

    def related(self, table: str, row: Row, name: str) -> tuple[str, list[Row]]:
        """Returns the table and the rows that a relation leads to."""

        def where(other: str, column: str) -> tuple[str, list[Row]]:
            return other, [one for one in self._rows(other) if one.get(column) == row["id"]]

        def one(other: str, column: str) -> tuple[str, list[Row]]:
            found = self.tables[other].get(row[column])
            return other, [] if found is None else [found]

        return {
            ("release", "belongs_to__application"): lambda: one("application", "application"),
            ("release", "release_image"): lambda: where("release_image", "release"),
            ("release", "is_running_on__device"): lambda: where("device", "running"),
            ("release", "is_pinned_to__device"): lambda: where("device", "pinned"),
            ("release", "should_be_running_on__application"): lambda: where(
                "application", "should_be_running__release"
            ),
            ("release_image", "image"): lambda: one("image", "image"),
            ("release_image", "is_part_of__release"): lambda: one("release", "release"),
            ("image", "release_image"): lambda: where("release_image", "image"),
            ("image", "image_install"): lambda: where("image_install", "image"),
            ("image", "is_a_build_of__service"): lambda: one("service", "service"),
            ("application", "owns__device"): lambda: where("device", "application"),
        }[table, name]()

    def _rows(self, table: str) -> list[Row]:
        return list(self.tables[table].values())

    # -- answers

    def answer(self, target: str, authorization: str | None) -> Answer:
        """Returns the answer to one GET."""
        self.requests.append(target)
        self.authorizations.append(authorization)
        if (other := self.instead(target)) is not None:
            return other
        parts = urlsplit(target)
        table = parts.path.removeprefix("/v7/")
        if not parts.path.startswith("/v7/"):
            return Answer(404, b"Not Found")
        if (authorization or "").removeprefix("Bearer ") not in self.tokens:
            # A guest: refused for devices, and sees no row of the rest.
            private = "device" in target or "image_install" in target
            return Answer(401) if private else Answer(200, b'{"d": []}')
        if table not in self.tables:
            return Answer(401)
        options = dict(one.split("=", 1) for one in parts.query.split("&") if one)
        options = {name: unquote(value) for name, value in options.items()}
        return Answer(
            200, json.dumps({"d": self._select(table, self._rows(table), options)}).encode()
        )

    def _select(self, table: str, rows: list[Row], options: dict[str, str]) -> list[Row]:
        if "$filter" in options:
            condition = Filter(self.related, options["$filter"]).parsed()
            rows = [row for row in rows if condition({"": (table, row)})]
        if "$orderby" in options:
            assert options["$orderby"] == "id asc"
            rows = sorted(rows, key=lambda row: int(row["id"]))
        rows = rows[: int(options.get("$top", len(rows)))]
        names = options["$select"].split(",")
        return [
            {name: self._column(table, row, name) for name in names}
            | self._expanded(table, row, options.get("$expand", ""))
            for row in rows
        ]

    def _column(self, table: str, row: Row, name: str) -> Any:
        if name == "belongs_to__application":
            return {"__id": row["application"]}
        return row[name]

    def _expanded(self, table: str, row: Row, text: str) -> Row:
        found: Row = {}
        for part in _split(text, ","):
            name, _, inside = part.partition("(")
            if name.endswith("/$count"):
                name = name.removesuffix("/$count")
                found[name] = len(self.related(table, row, name)[1])
                continue
            options = dict(
                one.split("=", 1) for one in _split(inside.removesuffix(")"), ";") if one
            )
            other, rows = self.related(table, row, name)
            found[name] = self._select(other, rows, options)
        return found


def iso(when: datetime) -> str:
    """Returns a time as the API writes it."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _split(text: str, at: str) -> list[str]:
    """Splits outside of brackets."""
    parts, depth, begin = [], 0, 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == at and not depth:
            parts.append(text[begin:place])
            begin = place + 1
    return [part for part in [*parts, text[begin:]] if part]


@contextmanager
def running_api(api: OpenBalenaApi | None = None) -> Iterator[OpenBalenaApi]:
    """Serves it on a free loopback port."""
    served = api or OpenBalenaApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = served.answer(self.path, self.headers.get("Authorization"))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def retries_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "BACKOFF", Backoff(attempts=2, first=0.01, most=0.02))


@pytest.fixture
def api() -> Iterator[OpenBalenaApi]:
    with running_api() as running:
        yield running
