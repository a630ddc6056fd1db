"""Failed builds: what is retried, what is remembered, and for whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytest_twisted

from obdelta import errors
from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.types import FullPull, Ready
from obdelta.builds.verdicts import Advice, verdict_of
from obdelta.errors import (
    BaseUnusable,
    BatchInvalid,
    BlobUnknown,
    Denied,
    DigestMismatch,
    LayerInvalid,
    ManifestInvalid,
    ObdeltaError,
    ProofFailed,
    StoreFull,
    Unauthorized,
    Unavailable,
    UpstreamUnavailable,
    WorkerFailed,
    WorkTooLong,
)
from obdelta.oci import (
    Descriptor,
    Digest,
    Manifest,
    parse_manifest,
)
from obdelta.oci.manifest import DOCKER_LAYER, DOCKER_MANIFEST
from obdelta.registry import Credentials
from tests.support.build_service import (
    A,
    B,
    C,
    D,
    manifest_of,
    world,
)
from tests.support.logs import logged


@pytest_twisted.ensureDeferred
async def test_three_failures_lead_to_a_full_pull_and_are_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for attempt in range(3):
            with pytest.raises(DigestMismatch):
                await w.build(attempt + 1, error=DigestMismatch("sha256:1", "sha256:2"))
        answer = await w.ask()
        assert isinstance(answer, FullPull)
        assert "expected sha256:1" in answer.reason
        assert len(w.builder.builds) == 3
        w.clock.advance(601)
        assert isinstance(await w.build(4), Ready)


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
        request = w.ask()
        await w.until_building(1)
        w.builder.finish(error=error)
        if isinstance(error, ProofFailed):
            await w.until_building(2)
            w.builder.finish(error=error)
        assert await request == FullPull(str(error))
        attempts = len(w.builder.builds)
        w.clock.advance(3600)
        assert await w.ask() == FullPull(str(error))
        assert len(w.builder.builds) == attempts


@pytest.mark.parametrize("error", [Unauthorized("expired"), Denied("no")])
@pytest_twisted.ensureDeferred
async def test_refused_credentials_are_no_verdict_on_the_pair(
    tmp_path: Path, error: ObdeltaError
) -> None:
    async with world(tmp_path) as w:
        for attempt in range(4):
            with pytest.raises(type(error)):
                await w.build(attempt + 1, error=error)


@pytest_twisted.ensureDeferred
async def test_an_unexpected_error_fails_its_build_only(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        request, other = w.ask(A, B), w.ask(A, C)
        await w.until_building(2)
        w.builder.finish(0, error=ZeroDivisionError())
        with pytest.raises(ObdeltaError, match="unexpected"):
            await request
        w.builder.finish(1)
        assert isinstance(await other, Ready)


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
            request = w.ask()
            await w.until_building(1)
            w.builder.finish(error=error)
            request.addErrback(lambda _: None)
            await request
    assert any(str(error) in line for line in bad) == (level == "warn")
    assert any(str(error) in line for line in normal) == (level == "info")


def test_every_error_has_a_verdict() -> None:
    """An error that is no verdict on the contents never becomes a full pull, and a verdict never
    becomes a status.
    """
    advice = {Advice.FULL_PULL: 0, Advice.RETRY: 0, Advice.REFUSED: 0}
    for kind in (
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ObdeltaError)
    ):
        verdict = verdict_of(kind.__new__(kind))
        advice[verdict.advice] += 1
        assert (verdict.advice is Advice.FULL_PULL) == bool(verdict.category), kind
        if issubclass(kind, Unavailable):
            assert verdict.advice is Advice.RETRY, kind
    assert all(advice.values())


@pytest.mark.parametrize("error", [DigestMismatch("sha256:1", "sha256:2"), ZeroDivisionError()])
@pytest_twisted.ensureDeferred
async def test_waiting_clients_get_the_error_even_if_it_cannot_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with world(tmp_path) as w:

        async def full(*args: object) -> None:
            raise StoreFull("no space is left")

        monkeypatch.setattr(w.catalogue.failures, "remember", full)
        monkeypatch.setattr(w.catalogue.counters, "add", full)
        for attempt in range(2):
            with pytest.raises(ObdeltaError, match=r"expected sha256:1|unexpected"):
                await w.build(attempt + 1, error=error)
        assert w.service.running == []
        # A counter that cannot be written does not prevent a full pull either.
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
async def test_errors_of_one_fleets_repositories_are_not_answered_to_another_fleet(
    tmp_path: Path, error: ObdeltaError
) -> None:
    """C and D have the contents of A and B."""
    async with world(tmp_path) as w:
        w.registry.found[C.repository] = manifest_of(A.repository)
        w.registry.found[D.repository] = manifest_of(B.repository)
        # A client that waits for the other's build starts its own when that fails.
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
        # The failure of the first is not reported to the second.
        for attempt in range(2):
            request = w.ask().addBoth(outcomes.append)
            await w.until_building(3 + attempt)
            w.builder.finish(error=error)
            await request
        assert isinstance(await w.ask(), FullPull)
        assert len(w.builder.builds) == 4
        assert isinstance(await w.build(5, C, D), Ready)
        # A verdict on the contents applies to all who have them.
        third = w.ask(C, D)
        await w.until_building(6)
        w.builder.finish(error=DeltaTooLarge(95, 100))
        assert await third == await w.ask() == FullPull(str(DeltaTooLarge(95, 100)))


@pytest_twisted.ensureDeferred
async def test_a_build_that_takes_too_long_is_not_retried_and_frees_its_slot(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, max_builds=1) as w:
        request, queued = w.ask(wait=9000), w.ask(A, C, wait=9000)
        await w.until_building(1)
        await w.waiting(2)
        w.clock.advance(1801)
        for answer in (await request, await w.ask()):
            assert isinstance(answer, FullPull)
            assert "more than 1800 seconds" in answer.reason
        assert w.builder.cancelled == 1
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await queued, Ready)
        assert w.builder.low_memory == [False, False]


def layered(repository: str, *layers: str) -> Manifest:
    """Returns a manifest with its own config over some layers."""
    value = json.loads(manifest_of(repository).raw)
    value["layers"] = [
        Descriptor(DOCKER_LAYER, Digest.of(layer.encode()), 10).as_json() for layer in layers
    ]
    found = parse_manifest(json.dumps(value).encode(), DOCKER_MANIFEST)
    assert isinstance(found, Manifest)
    return found


@pytest_twisted.ensureDeferred
async def test_a_build_that_takes_too_long_is_remembered_by_its_layers(tmp_path: Path) -> None:
    """A new manifest over the same layers does not start again, for a day; other layers do."""
    async with world(tmp_path) as w:
        w.registry.found[A.repository] = layered(A.repository, "1")
        w.registry.found[B.repository] = layered(B.repository, "1", "2")
        error = WorkTooLong("the job took more than 62 seconds")
        assert isinstance(await w.build(1, error=error), FullPull)
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
        assert isinstance(await w.build(2, A, D), Ready)
        w.clock.advance(13 * 3600)
        assert isinstance(await w.build(3, A, C), Ready)


@pytest.mark.parametrize("error", [WorkerFailed("killed"), ProofFailed("layer 3", "other bytes")])
@pytest_twisted.ensureDeferred
async def test_a_failure_of_the_server_is_retried_once_with_less_memory(
    tmp_path: Path, error: ObdeltaError
) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        await w.until_building(1)
        w.builder.finish(error=error)
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await request, Ready)
        assert w.builder.low_memory == [False, True]
        assert await w.catalogue.counters.all() == {"build.retried": 1}


@pytest_twisted.ensureDeferred
async def test_a_worker_that_dies_twice_is_remembered_for_the_failure_memory(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        for attempt in (1, 2):
            await w.until_building(attempt)
            w.builder.finish(error=WorkerFailed("killed by signal 9"))
        for answer in (await request, await w.ask()):
            assert isinstance(answer, FullPull)
            assert "signal 9" in answer.reason
        assert len(w.builder.builds) == 2
        w.clock.advance(601)
        assert isinstance(await w.build(3), Ready)


@pytest_twisted.ensureDeferred
async def test_a_full_disk_is_retried_once_if_space_was_freed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        request = w.ask()
        await w.until_building(1)
        w.builder.finish(error=StoreFull("no space is left on the disk"))
        await w.until_building(2)
        w.builder.finish()
        assert isinstance(await request, Ready)
        w.space_left = False
        with pytest.raises(StoreFull):
            await w.build(3, A, C, error=StoreFull("no space is left on the disk"))
        assert len(w.builder.builds) == 3
