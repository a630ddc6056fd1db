"""Answers of the build service: builds that clients share, full pulls, and known deltas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock

from obdelta.builds.failures import Failures
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.queue import FairQueue
from obdelta.builds.scheduler import Scheduler
from obdelta.builds.service import DeltaService
from obdelta.builds.types import (
    FullPull,
    Pair,
    Published,
    Ready,
    Turn,
)
from obdelta.concurrency.limits import Limit
from obdelta.errors import (
    BadRequest,
    Denied,
    ManifestInvalid,
    ManifestUnknown,
    StillBuilding,
    TooManyRequests,
    UpstreamUnavailable,
)
from obdelta.oci import (
    Descriptor,
    Digest,
    Form,
    Index,
    Reference,
)
from obdelta.oci.manifest import DOCKER_MANIFEST, OCI_INDEX, IndexEntry
from obdelta.registry import Credentials
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow
from tests.support.build_service import (
    ANONYMOUS,
    A,
    B,
    C,
    FreeSpace,
    Registry,
    SlowBuilder,
    manifest_of,
    world,
)
from tests.support.waiting import eventually
from tests.support.web import reactor


@pytest_twisted.ensureDeferred
async def test_many_clients_share_one_build_and_one_lookup(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        sent = [w.ask() for _ in range(50)]
        await w.waiting(50)
        assert len(w.builder.builds) == 1
        assert w.registry.requests == 2
        # Thousands may wait, each for images whose manifests come from strangers and may have 4
        # MiB.
        (pair, _) = w.builder.builds[0]
        assert (pair.base.manifest.raw, pair.target.manifest.raw) == (b"", b"")
        w.builder.finish()
        answers = [await one for one in sent]
        assert all(isinstance(answer, Ready) for answer in answers)


@pytest_twisted.ensureDeferred
async def test_a_wait_that_ends_leaves_the_build_running(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first, second = w.ask(wait=45), w.ask(wait=900)
        await w.waiting(2)
        w.clock.advance(46)
        with pytest.raises(StillBuilding):
            await first
        third = w.ask()
        await w.waiting(2)
        w.builder.finish()
        assert isinstance(await second, Ready)
        assert isinstance(await third, Ready)
        assert len(w.builder.builds) == 1


@pytest_twisted.ensureDeferred
async def test_a_device_that_leaves_cancels_only_its_own_wait(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        leaves, stays = w.ask(), w.ask()
        await w.waiting(2)
        leaves.cancel()
        with pytest.raises(CancelledError):
            await leaves
        assert w.builder.cancelled == 0
        w.builder.finish()
        assert isinstance(await stays, Ready)


@pytest_twisted.ensureDeferred
async def test_a_base_that_is_gone_means_a_full_pull(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        del w.registry.found[A.repository]
        answer = await w.ask()
        assert isinstance(answer, FullPull)
        assert "gone" in answer.reason


@pytest_twisted.ensureDeferred
async def test_a_target_that_is_gone_is_an_error(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        del w.registry.found[B.repository]
        with pytest.raises(ManifestUnknown):
            await w.ask()


@pytest.mark.parametrize("reference", [A, B])
@pytest_twisted.ensureDeferred
async def test_a_manifest_that_cannot_be_used_means_a_full_pull_and_is_looked_up_once(
    tmp_path: Path, reference: Reference
) -> None:
    async with world(tmp_path) as w:
        w.registry.found[reference.repository] = ManifestInvalid(
            "manifest", "its schemaVersion is not 2"
        )
        for _ in range(3):
            answer = await w.ask()
            assert isinstance(answer, FullPull)
            assert (answer.category, "schemaVersion" in answer.reason) == ("image-unusable", True)
        sent = w.registry.requests
        assert sent <= 2
        assert (await w.catalogue.counters.all()) == {"full_pull.image-unusable": 3}
        # A tag may be moved.
        w.registry.found[reference.repository] = manifest_of(reference.repository)
        w.clock.advance(11)
        assert isinstance(await w.build(1), Ready)


@pytest_twisted.ensureDeferred
async def test_a_base_that_the_upstream_calls_malformed_means_a_full_pull(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.found[A.repository] = BadRequest(
            "the upstream registry refuses the request (NAME_INVALID)"
        )
        assert isinstance(await w.ask(), FullPull)


@pytest_twisted.ensureDeferred
async def test_the_same_image_needs_no_delta(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert isinstance(await w.ask(A, A), FullPull)


@pytest_twisted.ensureDeferred
async def test_an_index_of_several_platforms_means_a_full_pull_and_of_one_that_image(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        inner = manifest_of(B.repository)
        entry = IndexEntry(Descriptor(DOCKER_MANIFEST, inner.digest, len(inner.raw)), "linux/arm64")
        w.registry.found[C.repository] = Index(b"", OCI_INDEX, Digest.of(b"index"), (entry, entry))
        assert isinstance(await w.ask(A, C), FullPull)


@pytest_twisted.ensureDeferred
async def test_a_rate_limit_of_the_upstream_is_a_transient_error(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.found[B.repository] = TooManyRequests("slow down")
        with pytest.raises(UpstreamUnavailable):
            await w.ask()


@pytest_twisted.ensureDeferred
async def test_a_client_that_may_not_pull_both_images_gets_no_delta(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        w.registry.allowed = {"good"}
        sent = w.ask(credentials=Credentials.bearer("good"))
        await w.until_building(1)
        with pytest.raises(Denied):
            await w.ask(credentials=Credentials.bearer("bad"))
        w.builder.finish()
        assert isinstance(await sent, Ready)
        with pytest.raises(Denied):
            await w.ask(credentials=Credentials.bearer("bad"))


class Elsewhere:
    """A double of the registry and of the other replicas: one of them builds the pair in both
    forms, and reports zstd.
    """

    def __init__(self) -> None:
        self.built: set[tuple[str, str]] = set()
        self.wait_first: Deferred[None] | None = None

    async def find(self, pair: Pair) -> Published | None:
        name = Reference("registry.example.com", pair.target.repository, pair.form.value)
        return Published(pair, name, 100, 10) if pair.repositories in self.built else None

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        pass

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Published | None:
        return await self.find(pair)

    async def turn(self, pair: Pair, waited: float) -> DeltaRow:
        if self.wait_first is not None:
            await self.wait_first
        self.built.add(pair.repositories)
        return DeltaRow(
            pair.key, *pair.repositories, pair.form.value, Digest.of(b"x"), 100, 10, 1.0, 1
        )

    async def wait(self, pair: Pair, waited: float) -> None:
        pass

    def report_end(self, turn: Turn, outcome: object) -> None:
        pass

    async def forget(self, pair: Pair) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("form", list(Form))
@pytest_twisted.ensureDeferred
async def test_another_replicas_delta_is_found_in_the_form_that_the_device_reads(
    form: Form, tmp_path: Path
) -> None:
    """Once, this was a full pull for old engines, although the registry has their form."""
    async with replica(tmp_path) as (service, _, _):
        answer = await service.delta("v3", A, B, ANONYMOUS, 45.0, form=form)
        assert isinstance(answer, Published) and answer.name.tag == form.value


@pytest_twisted.ensureDeferred
async def test_a_delta_found_in_one_repository_is_not_given_to_another(tmp_path: Path) -> None:
    """The owner of a repository can push what looks like a delta between images that others have,
    too.
    """
    async with replica(tmp_path) as (service, registry, elsewhere):
        copy = Reference("", "v2/" + "9" * 32)
        registry.found[copy.repository] = registry.found[B.repository]
        elsewhere.wait_first = Deferred()
        first = ensureDeferred(service.delta("v3", A, B, ANONYMOUS, 45.0))
        other = ensureDeferred(service.delta("v3", A, copy, ANONYMOUS, 45.0))
        await eventually("both wait", lambda: [build.waiting for build in service.running] == [2])
        elsewhere.wait_first.callback(None)
        answers = [await first, await other]
        assert [each.name.repository for each in answers if isinstance(each, Published)] == [
            B.repository,
            copy.repository,
        ]
        assert len(elsewhere.built) == 2


@asynccontextmanager
async def replica(tmp_path: Path) -> AsyncIterator[tuple[DeltaService, Registry, Elsewhere]]:
    """A server whose deltas another replica builds."""
    clock = Clock()
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    failures, elsewhere = Failures(catalogue, 600, clock.seconds), Elsewhere()
    builder, registry = SlowBuilder(), Registry()
    builder.kind, builder.forms = "v3", tuple(Form)
    service = DeltaService(
        clock=clock,
        catalogue=catalogue,
        lookup=ImageLookup(registry, clock, catalogue.named_images, clock.seconds),
        builders={"v3": builder},
        scheduler=Scheduler(
            clock=clock,
            catalogue=catalogue,
            failures=failures,
            queue=FairQueue(1, 0, clock),
            limit=Limit(0, "builds of one client"),
            build_seconds=1800,
            space=FreeSpace(lambda: ensureDeferred(no_room())),
            publishers={"v3": elsewhere},
            replicas=elsewhere,
        ),
        failures=failures,
        publishers={"v3": elsewhere},
    )
    try:
        yield service, registry, elsewhere
    finally:
        await service.close()
        await catalogue.close()


async def no_room() -> bool:
    return False


@pytest_twisted.ensureDeferred
async def test_a_delta_that_a_balena_engine_built_is_not_rebuilt(tmp_path: Path) -> None:
    """A balena-engine builds gzip, also where the setting is zstd."""
    async with world(tmp_path) as w:
        service = w.v3_service(Form.ZSTD, max_builds=1)
        key = await w.publish_v3(tmp_path, details={"builder": "balena-engine"})
        answer = await service.delta("v3", A, B, ANONYMOUS, 45.0, form=Form.ZSTD)
        assert isinstance(answer, Ready) and answer.delta.key == key
        assert w.builder.builds == []
        await service.close()
