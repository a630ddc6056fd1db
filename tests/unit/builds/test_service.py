"""One build a pair; joined waits; what is remembered. The catalogue is real, the upstream and the
builder are doubles that say when they are done, so that the order of events is the test's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock, deferLater
from twisted.web.http_headers import Headers

from obdelta import errors
from obdelta.builds.inputs.image_lookup import ImageLookup
from obdelta.builds.queue import Priority
from obdelta.builds.service import Answer, DeltaService, FullPull, Ready
from obdelta.builds.types import DeltaTooLarge, Grows, Pair, Report
from obdelta.builds.verdicts import Advice, verdict_of
from obdelta.concurrency.limits import Limit
from obdelta.errors import (
    BadRequest,
    BaseUnusable,
    BatchInvalid,
    BlobUnknown,
    Cancelled,
    Denied,
    DigestMismatch,
    LayerInvalid,
    ManifestInvalid,
    ManifestUnknown,
    ObdeltaError,
    ProofFailed,
    QueueFull,
    StillBuilding,
    StoreFull,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UpstreamUnavailable,
    WorkerFailed,
    WorkTooLong,
)
from obdelta.oci import Descriptor, Digest, ImageConfig, Index, Manifest, Reference, parse_manifest
from obdelta.oci.manifest import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, OCI_INDEX, IndexEntry
from obdelta.registry import Credentials, ProxiedRequest, ProxiedResponse, Sink
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaRow, Kind
from tests.support.logs import logged
from tests.support.web import reactor

A, B, C, D, E, F, G, H = (Reference("", f"v2/{letter * 32}") for letter in "abcdef01")
NOBODY = Credentials.anonymous()


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
    """A double of the upstream: manifests by repository, or the error that asking gives."""

    def __init__(self) -> None:
        self.found: dict[str, Manifest | Index | ObdeltaError] = {
            r.repository: manifest_of(r.repository) for r in (A, B, C, D, E, F, G, H)
        }
        self.allowed: set[str] | None = None
        self.asked = 0

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        self.asked += 1
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


class SlowBuilder:
    """A double of a builder: each build waits for the test's word."""

    kind: Kind = "v2"
    recipe = 1

    def __init__(self) -> None:
        self.builds: list[tuple[Pair, Deferred[None]]] = []
        self.called_off = 0
        self.low_memory: list[bool] = []

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        grows: Grows,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        go: Deferred[None] = Deferred()
        self.low_memory.append(low_memory)
        self.builds.append((pair, go))
        try:
            await go
        except CancelledError:
            self.called_off += 1
            raise
        return DeltaRow(
            pair.key,
            pair.base.repository,
            pair.target.repository,
            None,
            Digest.of(b"x"),
            100,
            10,
            1.0,
            1,
        )

    def finish(self, number: int = -1, error: Exception | None = None) -> None:
        go = self.builds[number][1]
        if error is None:
            go.callback(None)
        else:
            go.errback(error)


class World:
    def __init__(
        self,
        clock: Clock,
        registry: Registry,
        builder: SlowBuilder,
        coordinator: DeltaService,
        catalogue: Catalogue,
    ) -> None:
        self.clock, self.registry, self.builder, self.coordinator = (
            clock,
            registry,
            builder,
            coordinator,
        )
        self.catalogue = catalogue
        self.room = True

    async def make_room(self) -> bool:
        return self.room

    async def until_idle(self) -> None:
        """Lets it answer until nothing is queued or under way."""
        for _ in range(500):
            if not self.coordinator.running:
                return
            await deferLater(reactor, 0.01, lambda: None)
        raise AssertionError("builds are still under way")

    def ask(
        self,
        base: Reference = A,
        target: Reference = B,
        wait: float = 45.0,
        credentials: Credentials = NOBODY,
        subject: str = "",
        priority: Priority = Priority.DEVICE,
    ) -> Deferred[Answer]:
        return ensureDeferred(
            self.coordinator.delta(
                "v2", base, target, credentials, wait, subject, priority=priority
            )
        )

    async def until_building(self, count: int) -> None:
        """Lets the catalogue's thread answer until so many builds have begun."""
        for _ in range(500):
            if len(self.builder.builds) >= count:
                return
            await deferLater(reactor, 0.01, lambda: None)
        raise AssertionError(f"{len(self.builder.builds)} builds have begun, not {count}")

    async def waiting(self, count: int) -> None:
        """Lets it answer until so many wait, and a build has begun."""
        for _ in range(500):
            if (
                self.builder.builds
                and sum(len(build.waiters) for build in self.coordinator.running) >= count
            ):
                return
            await deferLater(reactor, 0.01, lambda: None)
        raise AssertionError("nobody waits")


@asynccontextmanager
async def world(
    tmp_path: Path, max_builds: int = 2, max_queue: int = 0, most_of_one: int = 0
) -> AsyncIterator[World]:
    clock = Clock()
    clock.advance(1_000_000)
    registry = Registry()
    catalogue = await Catalogue.open(tmp_path / "catalogue.sqlite", reactor)
    builder = SlowBuilder()
    coordinator = DeltaService(
        clock=clock,
        catalogue=catalogue,
        lookup=ImageLookup(registry, clock),
        builders={"v2": builder},
        max_builds=max_builds,
        build_seconds=1800,
        failure_memory=600,
        queued=Limit(most_of_one, "builds of one client"),
        max_queue=max_queue,
        make_room=lambda: made.make_room(),
        now=clock.seconds,
    )
    made = World(clock, registry, builder, coordinator, catalogue)
    try:
        yield made
    finally:
        await coordinator.close()
        await catalogue.close()


@pytest_twisted.ensureDeferred
async def test_many_askers_share_one_build_and_one_lookup(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked = [w.ask() for _ in range(50)]
        await w.waiting(50)
        assert len(w.builder.builds) == 1
        assert w.registry.asked == 2
        # Thousands may wait, each for images of which a stranger made the manifests, 4 MiB of them
        # if he likes.
        (pair, _) = w.builder.builds[0]
        assert (pair.base.manifest.raw, pair.target.manifest.raw) == (b"", b"")
        w.builder.finish()
        answers = [await one for one in asked]
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
        assert w.builder.called_off == 0
        w.builder.finish()
        assert isinstance(await stays, Ready)


@pytest_twisted.ensureDeferred
async def test_builds_beyond_the_limit_queue(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        first, second = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        assert len(w.builder.builds) == 1
        w.builder.finish()
        assert isinstance(await first, Ready)
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await second, Ready)


@pytest_twisted.ensureDeferred
async def test_three_failures_lead_to_a_full_pull_and_are_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for attempt in range(3):
            asked = w.ask()
            await w.until_building(attempt + 1)
            w.builder.finish(error=DigestMismatch("sha256:1", "sha256:2"))
            with pytest.raises(DigestMismatch):
                await asked
        answer = await w.ask()
        assert isinstance(answer, FullPull)
        assert "expected sha256:1" in answer.reason
        assert len(w.builder.builds) == 3
        w.clock.advance(601)
        again = w.ask()
        await w.until_building(4)
        w.builder.finish()
        assert isinstance(await again, Ready)


@pytest.mark.parametrize(
    "error",
    [
        DeltaTooLarge(95, 100),
        ProofFailed("layer 3", "other bytes"),
        BaseUnusable("its layers repeat"),
        ManifestInvalid("config", "it is not JSON"),
        LayerInvalid("sha256:1", "not a tar"),
        BatchInvalid("no end"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_verdict_on_the_contents_is_remembered_at_once(
    tmp_path: Path, error: ObdeltaError
) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        await w.until_building(1)
        w.builder.finish(error=error)
        if isinstance(error, ProofFailed):
            await w.until_building(2)
            w.builder.finish(error=error)
        assert await asked == FullPull(str(error))
        attempts = len(w.builder.builds)
        w.clock.advance(3600)
        assert await w.ask() == FullPull(str(error))
        assert len(w.builder.builds) == attempts


@pytest.mark.parametrize("error", [Unauthorized("expired"), Denied("no")])
@pytest_twisted.ensureDeferred
async def test_refused_credentials_say_nothing_of_the_pair(
    tmp_path: Path, error: ObdeltaError
) -> None:
    async with world(tmp_path) as w:
        for attempt in range(4):
            asked = w.ask()
            await w.until_building(attempt + 1)
            w.builder.finish(error=error)
            with pytest.raises(type(error)):
                await asked


@pytest_twisted.ensureDeferred
async def test_an_unexpected_error_fails_its_build_only(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked, other = w.ask(A, B), w.ask(A, C)
        await w.until_building(2)
        w.builder.finish(0, error=ZeroDivisionError())
        with pytest.raises(ObdeltaError, match="unexpected"):
            await asked
        w.builder.finish(1)
        assert isinstance(await other, Ready)


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
        asked = w.registry.asked
        assert asked <= 2
        assert (await w.catalogue.counters()) == {"full_pull.image-unusable": 3}
        # A tag may move on.
        w.registry.found[reference.repository] = manifest_of(reference.repository)
        w.clock.advance(11)
        again = w.ask()
        await w.until_building(1)
        w.builder.finish()
        assert isinstance(await again, Ready)


@pytest_twisted.ensureDeferred
async def test_a_base_that_the_upstream_calls_malformed_means_a_full_pull(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.found[A.repository] = BadRequest(
            "the upstream registry refuses the request (NAME_INVALID)"
        )
        assert isinstance(await w.ask(), FullPull)


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (DeltaTooLarge(95, 100), "info"),
        (LayerInvalid("sha256:1", "not a tar"), "info"),
        (DigestMismatch("sha256:1", "sha256:2"), "warn"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_normal_verdict_is_no_warning(
    tmp_path: Path, error: ObdeltaError, level: str
) -> None:
    with logged("warn", "error") as bad, logged("info") as normal:
        async with world(tmp_path) as w:
            asked = w.ask()
            await w.until_building(1)
            w.builder.finish(error=error)
            asked.addErrback(lambda _: None)
            await asked
    assert any(str(error) in line for line in bad) == (level == "warn")
    assert any(str(error) in line for line in normal) == (level == "info")


def test_every_error_has_a_verdict() -> None:
    """What is no verdict on the contents never becomes a full pull, and what is one is never a
    status.
    """
    advice = {Advice.FULL_PULL: 0, Advice.ASK_AGAIN: 0, Advice.REFUSED: 0}
    for kind in (
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ObdeltaError)
    ):
        verdict = verdict_of(kind.__new__(kind))
        advice[verdict.advice] += 1
        assert (verdict.advice is Advice.FULL_PULL) == bool(verdict.category), kind
        if issubclass(kind, Unavailable):
            assert verdict.advice is Advice.ASK_AGAIN, kind
    assert all(advice.values())


@pytest_twisted.ensureDeferred
async def test_the_same_image_needs_no_delta(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert isinstance(await w.ask(A, A), FullPull)


@pytest_twisted.ensureDeferred
async def test_several_platforms_mean_a_full_pull_and_one_is_that_one(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        inner = manifest_of(B.repository)
        entry = IndexEntry(Descriptor(DOCKER_MANIFEST, inner.digest, len(inner.raw)), "linux/arm64")
        w.registry.found[C.repository] = Index(b"", OCI_INDEX, Digest.of(b"index"), (entry, entry))
        assert isinstance(await w.ask(A, C), FullPull)


@pytest_twisted.ensureDeferred
async def test_the_upstreams_rate_limit_is_passing_trouble(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.found[B.repository] = TooManyRequests("slow down")
        with pytest.raises(UpstreamUnavailable):
            await w.ask()


@pytest_twisted.ensureDeferred
async def test_who_may_not_pull_both_gets_nothing_of_a_finished_delta(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.registry.allowed = {"good"}
        asked = w.ask(credentials=Credentials.bearer("good"))
        await w.until_building(1)
        with pytest.raises(Denied):
            await w.ask(credentials=Credentials.bearer("bad"))
        w.builder.finish()
        assert isinstance(await asked, Ready)
        with pytest.raises(Denied):
            await w.ask(credentials=Credentials.bearer("bad"))


@pytest_twisted.ensureDeferred
async def test_closing_calls_builds_off(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        await w.waiting(1)
        await w.coordinator.close()
        with pytest.raises(ObdeltaError, match="stopping"):
            await asked
        assert w.builder.called_off == 1
        with pytest.raises(ObdeltaError, match="stopping"):
            await w.ask(A, C)


@pytest.mark.parametrize("error", [DigestMismatch("sha256:1", "sha256:2"), ZeroDivisionError()])
@pytest_twisted.ensureDeferred
async def test_who_waits_is_told_even_if_the_failure_cannot_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with world(tmp_path) as w:

        async def full(*args: object) -> None:
            raise StoreFull("no space is left")

        monkeypatch.setattr(w.catalogue, "remember_failure", full)
        monkeypatch.setattr(w.catalogue, "add", full)
        for attempt in range(2):
            asked = w.ask()
            await w.until_building(attempt + 1)
            w.builder.finish(error=error)
            with pytest.raises(ObdeltaError, match=r"expected sha256:1|unexpected"):
                await asked
        assert w.coordinator.running == []
        # Nor does a counter that cannot be written keep anybody from a full pull.
        assert isinstance(await w.ask(A, A), FullPull)


@pytest_twisted.ensureDeferred
async def test_refused_credentials_fail_their_owner_only(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first = w.ask(credentials=Credentials.bearer("expired"))
        await w.until_building(1)
        same = w.ask(credentials=Credentials.bearer("expired"))
        others = [w.ask(credentials=Credentials.bearer(f"good-{number}")) for number in range(3)]
        await w.waiting(5)
        w.builder.finish(error=Unauthorized("expired"))
        for refused in (first, same):
            with pytest.raises(Unauthorized):
                await refused
        await w.until_building(2)
        await w.waiting(3)
        w.builder.finish()
        assert [type(await other) for other in others] == [Ready] * 3
        assert len(w.builder.builds) == 2


@pytest.mark.parametrize("error", [BlobUnknown("sha256:1"), UpstreamUnavailable("it answered 500")])
@pytest_twisted.ensureDeferred
async def test_trouble_in_one_fleets_repositories_is_no_answer_for_another_fleet(
    tmp_path: Path, error: ObdeltaError
) -> None:
    """C and D have the contents of A and B."""
    async with world(tmp_path) as w:
        w.registry.found[C.repository] = manifest_of(A.repository)
        w.registry.found[D.repository] = manifest_of(B.repository)
        # Who waits for the other's build when it fails starts its own.
        first = w.ask()
        await w.until_building(1)
        second = w.ask(C, D)
        await w.waiting(2)
        w.builder.finish(error=error)
        outcomes: list[object] = []
        first.addBoth(outcomes.append)
        await w.until_building(2)
        assert w.builder.builds[1][0].repositories == (C.repository, D.repository)
        w.builder.finish()
        assert isinstance(await second, Ready)
        assert len(outcomes) == 1
        # What is remembered of the first is not told to the second.
        for attempt in range(2):
            asked = w.ask().addBoth(outcomes.append)
            await w.until_building(3 + attempt)
            w.builder.finish(error=error)
            await asked
        assert isinstance(await w.ask(), FullPull)
        assert len(w.builder.builds) == 4
        other = w.ask(C, D)
        await w.until_building(5)
        w.builder.finish()
        assert isinstance(await other, Ready)
        # A verdict on the contents is for all that have them.
        third = w.ask(C, D)
        await w.until_building(6)
        w.builder.finish(error=DeltaTooLarge(95, 100))
        assert await third == await w.ask() == FullPull(str(DeltaTooLarge(95, 100)))


@pytest_twisted.ensureDeferred
async def test_a_second_attempt_waits_for_its_turn(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        asked, queued = w.ask(wait=9000), w.ask(A, C, wait=9000)
        await w.until_building(1)
        await w.waiting(2)
        w.clock.advance(100)
        w.builder.finish(error=WorkerFailed("killed"))
        await w.until_building(2)
        assert w.builder.builds[0][0] != w.builder.builds[1][0], "the one that waited comes first"
        assert [build.started is None for build in w.coordinator.running] == [True, False]
        w.builder.finish()
        assert isinstance(await queued, Ready)
        await w.until_building(3)
        w.builder.finish()
        assert isinstance(await asked, Ready)
        assert w.builder.low_memory == [False, False, True]


@pytest_twisted.ensureDeferred
async def test_a_build_that_takes_too_long_is_not_tried_again_and_gives_its_place_back(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, max_builds=1) as w:
        asked, queued = w.ask(wait=9000), w.ask(A, C, wait=9000)
        await w.until_building(1)
        await w.waiting(2)
        w.clock.advance(1801)
        for answer in (await asked, await w.ask()):
            assert isinstance(answer, FullPull)
            assert "more than 1800 seconds" in answer.reason
        assert w.builder.called_off == 1
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await queued, Ready)
        assert w.builder.low_memory == [False, False]


def layered(repository: str, *layers: str) -> Manifest:
    """A manifest with a config of its own over some layers."""
    value = json.loads(manifest_of(repository).raw)
    value["layers"] = [
        Descriptor(DOCKER_LAYER, Digest.of(layer.encode()), 10).as_json() for layer in layers
    ]
    found = parse_manifest(json.dumps(value).encode(), DOCKER_MANIFEST)
    assert isinstance(found, Manifest)
    return found


@pytest_twisted.ensureDeferred
async def test_work_that_takes_too_long_is_remembered_by_its_layers(tmp_path: Path) -> None:
    """A new manifest over the same layers does not begin anew, for a day; other layers do."""
    async with world(tmp_path) as w:
        w.registry.found[A.repository] = layered(A.repository, "1")
        w.registry.found[B.repository] = layered(B.repository, "1", "2")
        asked = w.ask()
        await w.until_building(1)
        w.builder.finish(error=WorkTooLong("the job took more than 62 seconds"))
        assert isinstance(await asked, FullPull)
        w.registry.found[C.repository] = layered(C.repository, "1", "2")
        for hours in (0, 12):
            w.clock.advance(hours * 3600)
            answer = await w.ask(A, C)
            assert isinstance(answer, FullPull)
            assert (answer.category, "more than 62 seconds" in answer.reason) == (
                "build-failed",
                True,
            )
        assert len(w.builder.builds) == 1
        w.registry.found[D.repository] = layered(D.repository, "1", "3")
        other = w.ask(A, D)
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await other, Ready)
        w.clock.advance(13 * 3600)
        later = w.ask(A, C)
        await w.until_building(3)
        w.builder.finish()
        assert isinstance(await later, Ready)


@pytest.mark.parametrize("error", [WorkerFailed("killed"), ProofFailed("layer 3", "other bytes")])
@pytest_twisted.ensureDeferred
async def test_what_failed_on_our_side_is_tried_once_more_frugally(
    tmp_path: Path, error: ObdeltaError
) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        await w.until_building(1)
        w.builder.finish(error=error)
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await asked, Ready)
        assert w.builder.low_memory == [False, True]
        assert await w.catalogue.counters() == {"build.retried": 1}


@pytest_twisted.ensureDeferred
async def test_a_worker_that_dies_twice_is_remembered_for_the_failure_memory(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        for attempt in (1, 2):
            await w.until_building(attempt)
            w.builder.finish(error=WorkerFailed("killed by signal 9"))
        for answer in (await asked, await w.ask()):
            assert isinstance(answer, FullPull)
            assert "signal 9" in answer.reason
        assert len(w.builder.builds) == 2
        w.clock.advance(601)
        again = w.ask()
        await w.until_building(3)
        w.builder.finish()
        assert isinstance(await again, Ready)


@pytest_twisted.ensureDeferred
async def test_a_full_disk_is_tried_once_more_where_there_is_room_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        await w.until_building(1)
        w.builder.finish(error=StoreFull("no space is left on the disk"))
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await asked, Ready)
        w.room = False
        other = w.ask(A, C)
        await w.until_building(3)
        w.builder.finish(error=StoreFull("no space is left on the disk"))
        with pytest.raises(StoreFull):
            await other
        assert len(w.builder.builds) == 3


@pytest_twisted.ensureDeferred
async def test_a_full_queue_is_no_refusal_for_good(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        first, second = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        with pytest.raises(QueueFull):
            await w.ask(B, C)
        # Who joins a build takes no place.
        joined = w.ask(A, C)
        await w.waiting(3)
        w.builder.finish()
        await w.until_building(2)
        third = w.ask(B, C)
        await w.waiting(2)
        w.builder.finish()
        await w.until_building(3)
        w.builder.finish()
        assert [type(await one) for one in (first, second, joined, third)] == [Ready] * 4


async def until_queued(w: World, *pairs: tuple[Reference, Reference]) -> None:
    """Lets it answer until just these wait for a place."""
    wanted = {(base.repository, target.repository) for base, target in pairs}
    for _ in range(500):
        queued = [build.pair for build in w.coordinator.running if build.started is None]
        if {
            (pair.base.repository, pair.target.repository) for pair in queued
        } == wanted and w.builder.builds:
            return
        await deferLater(reactor, 0.01)
    raise AssertionError("others wait")


@pytest_twisted.ensureDeferred
async def test_when_the_queue_is_full_the_longest_line_gives_way(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1, max_queue=4) as w:
        running = w.ask(A, B, subject="hostile")
        await w.until_building(1)
        hostile = [w.ask(A, target, subject="hostile") for target in (C, D)]
        await until_queued(w, (A, C), (A, D))
        other = w.ask(B, C, subject="other")
        await until_queued(w, (A, C), (B, C))
        with pytest.raises(QueueFull):
            await hostile[
                1
            ]  # half of the queue is all that one fleet gets; the hostile line was the longer one
        second = [w.ask(E, F, subject="device 1"), w.ask(F, E, subject="device 2")]
        await until_queued(w, (A, C), (B, C), (E, F), (F, E))
        newcomer = w.ask(G, H, subject="device 3")
        await until_queued(w, (A, C), (B, C), (E, F), (G, H))
        with pytest.raises(QueueFull):
            await second[1]
        assert await w.catalogue.failures(int(w.clock.seconds()), 86400) == [], (
            "it says nothing of the pairs"
        )
        for count in range(1, 6):
            await w.until_building(count)
            w.builder.finish()
        assert [type(await one) for one in (running, hostile[0], other, second[0], newcomer)] == [
            Ready
        ] * 5


@pytest_twisted.ensureDeferred
async def test_a_subject_with_many_targets_holds_no_other_up(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=2) as w:
        hostile = [w.ask(A, target, subject="hostile") for target in (B, C, D)]
        hostile += [w.ask(B, target, subject="hostile") for target in (A, C, D)]
        await w.until_building(2)
        device = w.ask(E, F, subject="device")
        await w.waiting(7)
        w.builder.finish(0)
        await w.until_building(3)
        assert w.builder.builds[2][0].target.repository == F.repository
        w.builder.finish(2)
        assert isinstance(await device, Ready)
        await w.coordinator.close()
        for one in hostile:
            one.addErrback(lambda _: None)


@pytest_twisted.ensureDeferred
async def test_who_joins_a_queued_build_raises_it(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        asked = [w.ask(A, B, subject="first")]
        await w.until_building(1)
        asked.append(w.ask(A, C, subject="builder", priority=Priority.UNPRIVILEGED))
        await until_queued(w, (A, C))
        asked.append(w.ask(A, D, subject="operators", priority=Priority.PREPARED))
        await until_queued(w, (A, C), (A, D))
        asked.append(w.ask(A, E, subject="first"))
        await until_queued(w, (A, C), (A, D), (A, E))
        asked.append(w.ask(A, C, subject="device"))
        await w.waiting(5)
        for count, target in enumerate((B, C, E, D), 1):
            await w.until_building(count)
            assert w.builder.builds[-1][0].target.repository == target.repository
            w.builder.finish()
        assert [type(await one) for one in asked] == [Ready] * 5


@pytest_twisted.ensureDeferred
async def test_a_token_that_grants_nothing_connects_no_fleets(tmp_path: Path) -> None:
    """Whoever has one could otherwise make one fleet of all, and none would have a share of its
    own.
    """
    async with world(tmp_path) as w:
        asked = w.ask(A, B, subject="builder", priority=Priority.UNPRIVILEGED)
        await w.until_building(1)
        fleets = w.coordinator._fleets
        assert fleets.of(A.repository, A.repository) != fleets.of(B.repository, B.repository)
        w.builder.finish()
        assert isinstance(await asked, Ready)


@pytest_twisted.ensureDeferred
async def test_what_is_resumed_waits_behind_devices_until_they_ask_again(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        for target in (B, C, D):
            w.ask(A, target, subject="hostile").addErrback(lambda _: None)
        w.ask(E, F, subject="device").addErrback(lambda _: None)
        await w.waiting(4)
        await w.coordinator.close()
    async with world(tmp_path, max_builds=1, max_queue=1) as w:
        assert await w.coordinator.resume(NOBODY) == 4, "the bounds hold for new builds"
        await w.until_building(1)
        again = w.ask(E, F, subject="device")
        await w.waiting(1)
        w.builder.finish()
        await w.until_building(2)
        assert w.builder.builds[-1][0].target.repository == F.repository
        w.builder.finish()
        assert isinstance(await again, Ready)


@pytest_twisted.ensureDeferred
async def test_one_asker_with_too_many_builds_waits_too(tmp_path: Path) -> None:
    async with world(tmp_path, most_of_one=1) as w:
        first = w.ask(A, B)
        await w.waiting(1)
        with pytest.raises(QueueFull):
            await w.ask(A, C)
        w.builder.finish()
        assert isinstance(await first, Ready)


# -- ends and starts of the process ------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_queued_builds_go_on_after_a_restart(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        asked = [w.ask(A, B), w.ask(A, C)]
        await w.waiting(2)
        await w.coordinator.close()
        for one in asked:
            with pytest.raises(Cancelled):
                await one
    async with world(tmp_path, max_builds=1) as w:
        assert await w.coordinator.resume(NOBODY) == 2
        for count, target in ((1, B), (2, C)):
            await w.until_building(count)
            assert w.builder.builds[-1][0].target.repository == target.repository
            w.builder.finish()
        await w.until_idle()
    async with world(tmp_path) as w:
        assert await w.coordinator.resume(NOBODY) == 0


@pytest_twisted.ensureDeferred
async def test_a_queued_build_that_only_a_device_may_have_is_dropped(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked = w.ask()
        await w.waiting(1)
        await w.coordinator.close()
        with pytest.raises(Cancelled):
            await asked
    async with world(tmp_path) as w:
        w.registry.allowed = {"a device's"}
        assert await w.coordinator.resume(NOBODY) == 0
        assert await w.catalogue.counters() == {"queue.dropped": 1}
        w.registry.allowed = None
        assert await w.coordinator.resume(NOBODY) == 0


@pytest_twisted.ensureDeferred
async def test_a_build_that_ends_the_process_each_time_is_dropped(tmp_path: Path) -> None:
    for start in range(4):
        async with world(tmp_path) as w:
            if start:
                assert await w.coordinator.resume(NOBODY) == int(start < 3)
            else:
                asked = w.ask()
                await w.waiting(1)
                asked.addErrback(lambda _: None)
            await w.coordinator.close()


@pytest_twisted.ensureDeferred
async def test_draining_lets_what_runs_end_and_hands_back_what_waits(tmp_path: Path) -> None:
    async with world(tmp_path, max_builds=1) as w:
        runs, waits = w.ask(A, B), w.ask(A, C)
        await w.waiting(2)
        drained = ensureDeferred(w.coordinator.drain(30))
        with pytest.raises(Cancelled):
            await waits
        assert not drained.called
        w.builder.finish()
        assert isinstance(await runs, Ready)
        await drained
    async with world(tmp_path) as w:
        assert await w.coordinator.resume(NOBODY) == 1
        await w.until_building(1)
        assert w.builder.builds[0][0].target.repository == C.repository
        drained = ensureDeferred(w.coordinator.drain(30))
        w.clock.advance(31)
        await drained
        assert len(w.coordinator.running) == 1
