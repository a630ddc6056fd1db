"""A build service on a clock of the test, with a real catalogue.

The upstream and the builder are doubles: the test decides when they answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers

from obdelta.builds.failures import Failures
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.publish.delta_tags import delta_tag
from obdelta.builds.publish.other_forms import OtherForms
from obdelta.builds.queue import FairQueue, Priority
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.service import DeltaService
from obdelta.builds.types import Answer, Builder, Pair, Report, ReportFile
from obdelta.concurrency.limits import Limit
from obdelta.errors import BlobUnknown, Denied, ManifestUnknown, ObdeltaError
from obdelta.oci import (
    Descriptor,
    Digest,
    Form,
    ImageConfig,
    Index,
    Manifest,
    Reference,
    parse_manifest,
)
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_MANIFEST
from obdelta.registry import Credentials, ProxiedRequest, ProxiedResponse, Sink
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from tests.support.store import a_manifest, a_row, real_threads
from tests.support.waiting import eventually
from tests.support.web import reactor

A, B, C, D, E, F, G, H = (Reference("", f"v2/{letter * 32}") for letter in "abcdef01")
ANONYMOUS = Credentials.anonymous()


def manifest_of(repository: str) -> Manifest:
    config = Descriptor(DOCKER_CONFIG, Digest.of(repository.encode()), 10)
    raw = (
        f'{{"schemaVersion":2,"mediaType":"{DOCKER_MANIFEST}","config":{{"mediaType":"{DOCKER_CONFIG}",'
        f'"size":10,"digest":"{config.digest}"}},"layers":[]}}'.encode()
    )
    found = parse_manifest(raw, DOCKER_MANIFEST)
    assert isinstance(found, Manifest)
    return found


class Registry:
    """A double of the upstream. It returns manifests by repository, or the error that is set."""

    def __init__(self) -> None:
        self.found: dict[str, Manifest | Index | ObdeltaError] = {
            r.repository: manifest_of(r.repository) for r in (A, B, C, D, E, F, G, H)
        }
        self.allowed: set[str] | None = None
        self.requests = 0

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        self.requests += 1
        if self.allowed is not None and credentials.secret not in self.allowed:
            raise Denied("not yours")
        found = self.found.get(repository, ManifestUnknown(repository, selector))
        if isinstance(found, ObdeltaError):
            raise found
        return found

    async def small_blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int
    ) -> bytes:
        raise BlobUnknown(descriptor.digest)

    async def config(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> ImageConfig:
        raise BlobUnknown(descriptor.digest)

    async def blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink
    ) -> None:
        raise BlobUnknown(descriptor.digest)

    async def blob_size(
        self, repository: str, digest: Digest, credentials: Credentials, *, patient: bool = True
    ) -> int | None:
        raise BlobUnknown(digest)

    async def relay(self, request: ProxiedRequest) -> ProxiedResponse:
        return ProxiedResponse(404, Headers(), 0, lambda consumer: Deferred(), lambda: None)

    async def close(self) -> None:
        pass


def row_of(pair: Pair, content: bytes = b"x", size: int = 10) -> DeltaRow:
    """Returns a row for the delta of a pair; the delta is not stored."""
    tag = None if pair.kind == "v2" else delta_tag(pair.key)
    return DeltaRow(pair.key, *pair.repositories, tag, Digest.of(content), 100, size, 1.0, 1)


class SlowBuilder:
    """A double of a builder: each build waits until the test ends it."""

    kind: Kind = "v2"
    recipe = 1
    forms: tuple[Form, ...] = (Form.GZIP,)

    def __init__(self) -> None:
        self.builds: list[tuple[Pair, Deferred[None]]] = []
        self.cancelled = 0
        self.low_memory: list[bool] = []
        self.row: DeltaRow | None = None
        """The delta that a build returns, if it is set."""

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        report_file: ReportFile,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        go: Deferred[None] = Deferred()
        self.low_memory.append(low_memory)
        self.builds.append((pair, go))
        try:
            await go
        except CancelledError:
            self.cancelled += 1
            raise
        if self.row is not None:
            return self.row
        return row_of(pair)

    def finish(self, number: int = -1, error: Exception | None = None) -> None:
        go = self.builds[number][1]
        if error is None:
            go.callback(None)
        else:
            go.errback(error)


class FreeSpace:
    """The store's space: the test decides whether a full disk has space again."""

    def __init__(self, room: Callable[[], Awaitable[bool]]) -> None:
        self._room = room

    async def admit(self) -> None:
        pass

    async def make_room(self) -> bool:
        return await self._room()

    def grew(self) -> None:
        pass


def make_service(
    clock: Clock,
    catalogue: Catalogue,
    registry: Registry,
    builder: Builder,
    *,
    space: FreeSpace,
    max_builds: int,
    max_queue: int,
    limit: Limit,
    build_seconds: float = 1800,
    both_forms: bool = False,
) -> DeltaService:
    """A service on a clock of the test, as the server makes it. ``both_forms``: after a
    delta, it builds the other form of it.
    """
    failures = Failures(catalogue, 600, clock.seconds)
    scheduler = Scheduler(
        clock=clock,
        catalogue=catalogue,
        failures=failures,
        queue=FairQueue(max_builds, max_queue, clock),
        limit=limit,
        build_seconds=build_seconds,
        space=space,
    )
    return DeltaService(
        clock=clock,
        catalogue=catalogue,
        lookup=ImageLookup(registry, clock, catalogue.named_images, clock.seconds),
        builders={builder.kind: builder},
        scheduler=scheduler,
        failures=failures,
        other_forms=OtherForms(clock, catalogue, scheduler, failures, builder)
        if both_forms
        else None,
    )


class World:
    def __init__(
        self,
        clock: Clock,
        registry: Registry,
        builder: SlowBuilder,
        service: DeltaService,
        catalogue: Catalogue,
    ) -> None:
        self.clock, self.registry, self.builder = clock, registry, builder
        self.service, self.catalogue = service, catalogue
        self.space_left = True

    async def make_room(self) -> bool:
        return self.space_left

    async def until_idle(self) -> None:
        """Runs the catalogue's thread until nothing is queued or in progress."""
        await eventually("no build is under way", lambda: not self.service.running)

    def ask(
        self,
        base: Reference = A,
        target: Reference = B,
        wait: float = 45.0,
        credentials: Credentials = ANONYMOUS,
        subject: str = "",
        priority: Priority = Priority.DEVICE,
    ) -> Deferred[Answer]:
        return ensureDeferred(
            self.service.delta("v2", base, target, credentials, wait, subject, priority=priority)
        )

    async def build(
        self,
        number: int,
        base: Reference = A,
        target: Reference = B,
        error: Exception | None = None,
    ) -> Answer:
        """Sends a request, ends build number ``number`` (the last one), and returns the answer."""
        answer = self.ask(base, target)
        await self.until_building(number)
        self.builder.finish(error=error)
        return await answer

    def v3_service(
        self, *forms: Form, max_builds: int, max_queue: int = 0, both_forms: bool = False
    ) -> DeltaService:
        """Returns a service beside this one that builds these forms of v3; the caller closes it."""
        self.builder.kind, self.builder.forms = "v3", forms
        return make_service(
            self.clock,
            self.catalogue,
            self.registry,
            self.builder,
            space=FreeSpace(self.make_room),
            max_builds=max_builds,
            max_queue=max_queue,
            limit=Limit(0, "builds of one client"),
            both_forms=both_forms,
        )

    async def publish_v3(self, folder: Path, form: Form = Form.GZIP, **changed: Any) -> DeltaKey:
        """Stores a delta from A to B in the store of that directory and the catalogue."""
        base, target = (manifest_of(image.repository).digest for image in (A, B))
        key = DeltaKey("v3", 1, base, target, form)
        manifest = a_manifest(b"config", [b"layer"])
        with real_threads() as threads:
            blobs = BlobStore(folder, threads)
            for content in (b"config", b"layer"):
                await blobs.put(content)
            row = replace(a_row(key, manifest.digest, 1), **changed)
            await self.catalogue.publish_v3(row, manifest, blobs)
        return key

    async def until_building(self, count: int) -> None:
        """Runs the catalogue's thread until this number of builds have begun."""
        await eventually(f"{count} builds have begun", lambda: len(self.builder.builds) >= count)

    async def until_waiting(self, service: DeltaService, count: int) -> None:
        """Runs the catalogue's thread until this number of clients wait for builds of a service."""
        await eventually(
            f"{count} clients wait",
            lambda: sum(build.waiting for build in service.running) >= count,
        )

    async def waiting(self, count: int) -> None:
        """Runs the catalogue's thread until this number wait and one build has begun."""
        await eventually("a build has begun", lambda: self.builder.builds)
        await self.until_waiting(self.service, count)


@asynccontextmanager
async def world(
    tmp_path: Path, max_builds: int = 2, max_queue: int = 0, client_limit: int = 0
) -> AsyncIterator[World]:
    clock = Clock()
    clock.advance(1_000_000)
    registry = Registry()
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    builder = SlowBuilder()
    service = make_service(
        clock,
        catalogue,
        registry,
        builder,
        space=FreeSpace(lambda: made.make_room()),
        max_builds=max_builds,
        max_queue=max_queue,
        limit=Limit(client_limit, "builds of one client"),
    )
    made = World(clock, registry, builder, service, catalogue)
    try:
        yield made
    finally:
        await service.close()
        await catalogue.close()
