"""The client of openBalena's API, over real HTTP: pages, bounds, refusals, and where the token
goes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_twisted

from obdelta.concurrency.tasks import Threads
from obdelta.errors import ApiRefused, ApiUnavailable
from obdelta.fleet import api_client
from obdelta.fleet.api_client import ApiClient, token_reader
from obdelta.fleet.releases import FleetReader
from obdelta.registry.requests import Backoff
from tests.support.logs import logged
from tests.support.openbalena_api import TOKEN, Answer, OpenBalenaApi, api, iso, running_api
from tests.support.store import REACTOR, threads

__all__ = ["api", "threads"]

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
DIGEST = "sha256:" + "ab" * 32
HOSTS = ["registry.example.com"]


@pytest.fixture(autouse=True)
def retries_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "BACKOFF", Backoff(attempts=3, first=0.01, most=0.02))


@asynccontextmanager
async def connected(
    api: OpenBalenaApi, threads: Threads, token: Path | str = TOKEN
) -> AsyncIterator[ApiClient]:
    client = ApiClient.connect(REACTOR, api.url, token_reader(token, threads))
    try:
        yield client
    finally:
        await client.close()


def repository(number: int) -> str:
    return f"v2/{number:032x}"


@pytest_twisted.ensureDeferred
async def test_releases_have_their_images_services_and_names(
    api: OpenBalenaApi, threads: Threads
) -> None:
    fleet = api.application("acme")
    api.release(
        fleet,
        {"web": (repository(1), DIGEST), "db": (repository(2), None)},
        version="1.2.3",
        commit="c0ffee",
        finalized=NOW,
    )
    api.release(fleet, {"web": (repository(3), None)}, draft=True)
    api.release(fleet, {"web": (repository(4), None)}, status="failed", finalized=NOW)
    api.release(fleet, {"web": (repository(5), None)}, finalized=NOW - timedelta(hours=1))
    async with connected(api, threads) as client:
        (found,) = await FleetReader(client, HOSTS).finalized(iso(NOW))
    assert (found.fleet, found.version, found.commit) == ("acme", "1.2.3", "c0ffee")
    assert found.finalized == iso(NOW)
    assert [(one.service, str(one.reference)) for one in found.images] == [
        ("web", f"{repository(1)}@{DIGEST}"),
        ("db", repository(2)),
    ]
    assert str(found.names(found.images[0])) == "acme/web 1.2.3 (c0ffee)"


@pytest_twisted.ensureDeferred
async def test_running_releases_are_sorted_by_their_number_of_devices(
    api: OpenBalenaApi, threads: Threads
) -> None:
    fleet, other = api.application(), api.application("other")
    releases = [api.release(fleet, {"web": (repository(n), None)}) for n in range(4)]
    for release, count in zip(releases, (2, 5, 0, 1), strict=True):
        api.devices(release, count)
    api.devices(api.release(other, {"web": (repository(9), None)}), 7)
    async with connected(api, threads) as client:
        found = await FleetReader(client, HOSTS).running(fleet)
    assert [(one.release.id, one.devices) for one in found] == [
        (releases[1], 5),
        (releases[0], 2),
        (releases[3], 1),
    ]


@pytest_twisted.ensureDeferred
async def test_every_row_of_many_pages_comes_once(
    api: OpenBalenaApi, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "PAGE", 7)
    fleet = api.application()
    made = [api.release(fleet, {"web": (repository(n), None)}, finalized=NOW) for n in range(50)]
    async with connected(api, threads) as client:
        found = await FleetReader(client, HOSTS).finalized(iso(NOW))
        assert [release.id for release in found] == made
        assert len(api.requests) == 1 + 8  # one that a guest may not ask, and the pages
        monkeypatch.setattr(api_client, "MAX_PAGES", 3)
        with pytest.raises(ApiUnavailable, match="more than 21 rows of release"):
            await FleetReader(client, HOSTS).finalized(iso(NOW))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Answer(401), ApiRefused, "api-token is wrong, has expired"),
        (Answer(403), ApiRefused, "api-token is wrong, has expired"),
        (Answer(404), ApiUnavailable, "has no /v7"),
        (Answer(400), ApiUnavailable, "answers 400"),
        (Answer(500), ApiUnavailable, "answers 500"),
        (Answer(429, headers={"Retry-After": "3600"}), ApiUnavailable, "limits our requests"),
        (Answer(200, b"<html>"), ApiUnavailable, "is api-url an openBalena API"),
        (Answer(200, b'{"d": 5}'), ApiUnavailable, "is api-url an openBalena API"),
        (Answer(200, b"[" * 100_000), ApiUnavailable, "is api-url an openBalena API"),
        (Answer(200, b'{"d": [{"id": "x"}]}'), ApiUnavailable, "a row has no expanded"),
        (Answer(200, b'{"d": [{"id": 1}, 5]}'), ApiUnavailable, "is api-url an openBalena API"),
        (Answer(200, b'{"d": [{}, {}]}'), ApiUnavailable, "more than the 1 rows"),
        (Answer(200, b"[]," * 210_000), ApiUnavailable, "200000 objects and lists"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_invalid_answers_become_one_of_two_errors(
    api: OpenBalenaApi, threads: Threads, answer: Answer, error: type[Exception], words: str
) -> None:
    api.instead = lambda _path: answer
    async with connected(api, threads) as client:
        with pytest.raises(error, match=words) as failure:
            await FleetReader(client, HOSTS).finalized(iso(NOW))
    assert TOKEN not in str(failure.value)


@pytest_twisted.ensureDeferred
async def test_a_server_error_that_passes_is_retried(api: OpenBalenaApi, threads: Threads) -> None:
    answers = [Answer(503), Answer(502)]
    api.instead = lambda _path: answers.pop() if answers else None
    async with connected(api, threads) as client:
        assert await FleetReader(client, HOSTS).finalized(iso(NOW)) == []
    assert len(api.requests) == 3 + 1


@pytest_twisted.ensureDeferred
async def test_no_redirect_is_followed_and_no_other_host_sees_the_token(
    api: OpenBalenaApi, threads: Threads
) -> None:
    with running_api() as other:
        api.instead = lambda path: Answer(302, headers={"Location": f"{other.url}{path}"})
        async with connected(api, threads) as client:
            with pytest.raises(ApiUnavailable, match="redirects, and is not followed"):
                await FleetReader(client, HOSTS).finalized(iso(NOW))
        assert other.requests == []
    assert api.authorizations == [f"Bearer {TOKEN}"]
    assert not any(TOKEN in request for request in api.requests)


@pytest_twisted.ensureDeferred
async def test_the_size_of_a_page_is_bounded(
    api: OpenBalenaApi, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "MAX_BODY", 1000)
    api.instead = lambda _path: Answer(200, json.dumps({"d": ["x" * 2000]}).encode())
    async with connected(api, threads) as client:
        with pytest.raises(ApiUnavailable, match="more than 1000 bytes"):
            await FleetReader(client, HOSTS).finalized(iso(NOW))


@pytest_twisted.ensureDeferred
async def test_rows_are_bounded_in_all_and_in_their_order(
    api: OpenBalenaApi, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "PAGE", 2)
    fleet = api.application()
    for n in range(8):
        api.release(fleet, {"web": (repository(n), None)}, finalized=NOW)
    async with connected(api, threads) as client:
        reader = FleetReader(client, HOSTS)
        assert len(await reader.finalized(iso(NOW))) == 8
        monkeypatch.setattr(api_client, "MAX_BYTES", 1500)
        with pytest.raises(ApiUnavailable, match="rows of release have more than 1500 bytes"):
            await reader.finalized(iso(NOW))
        # An API that ignores what a page should begin with would never end, or leave out rows.
        first = api.answer("/v7/release?$select=id&$top=2", f"Bearer {TOKEN}")
        api.instead = lambda path: first if "release?" in path else None
        begun = len(api.requests)
        with pytest.raises(ApiUnavailable, match="not sorted by their IDs"):
            async for _ in client.rows("release", select="id"):
                pass
        assert len(api.requests) == begun + 2
        place = json.dumps({"d": [{"id": 1, "is_stored_at__image_location": "x.io/v2/other"}]})
        api.instead = lambda path: Answer(200, place.encode()) if "/image?" in path else None
        with pytest.raises(ApiUnavailable, match="rows that were not asked for"):
            await reader.existing([f"{HOSTS[0]}/{repository(1)}"])


@pytest_twisted.ensureDeferred
async def test_images_of_another_registry_are_ignored_with_one_line(
    api: OpenBalenaApi, threads: Threads
) -> None:
    fleet, api.registry = api.application(), "other.example.com"
    for n in range(3):
        api.release(fleet, {"web": (repository(n), DIGEST)}, finalized=NOW)
    api.registry = HOSTS[0]
    api.release(fleet, {"web": (repository(3), DIGEST)}, finalized=NOW)
    async with connected(api, threads) as client:
        reader = FleetReader(client, HOSTS)
        with logged("warn") as lines:
            for _ in range(2):
                found = await reader.finalized(iso(NOW))
                assert [len(release.images) for release in found] == [0, 0, 0, 1]
    (line,) = [line for line in lines if "other.example.com" in line]
    assert "add it to registry-hosts" in line


@pytest_twisted.ensureDeferred
async def test_an_unreachable_api_is_one_error(threads: Threads) -> None:
    with running_api() as gone:
        pass
    async with connected(gone, threads) as client:
        with pytest.raises(ApiUnavailable, match="cannot connect to"):
            await FleetReader(client, HOSTS).finalized(iso(NOW))


@pytest_twisted.ensureDeferred
async def test_a_token_that_expired_is_replaced_in_its_file(
    api: OpenBalenaApi, threads: Threads, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async with connected(api, threads, file) as client:
        reader = FleetReader(client, HOSTS)
        assert await reader.finalized(iso(NOW)) == []
        api.tokens = {"the-next"}
        with pytest.raises(ApiRefused, match="401"):
            await reader.finalized(iso(NOW))
        file.write_text("the-next")
        assert await reader.finalized(iso(NOW)) == []
        for content, words in (("", "has no token"), ("a b", "has no token"), ("ä", "cannot be")):
            file.write_text(content)
            with pytest.raises(ApiRefused, match=words):
                await reader.finalized(iso(NOW))
        file.unlink()
        with pytest.raises(ApiRefused, match="cannot be read"):
            await reader.finalized(iso(NOW))


@pytest_twisted.ensureDeferred
async def test_a_guest_sees_nothing_and_is_still_refused(
    api: OpenBalenaApi, threads: Threads
) -> None:
    fleet = api.application()
    api.release(fleet, {"web": (repository(1), None)}, finalized=NOW)
    async with connected(api, threads, "expired") as client:
        assert await client.page("release", select="id") == []
        for call in (
            FleetReader(client, HOSTS).finalized(iso(NOW)),
            FleetReader(client, HOSTS).running(fleet),
            FleetReader(client, HOSTS).fleets([fleet]),
            FleetReader(client, HOSTS).existing([f"{api.registry}/{repository(1)}"]),
            FleetReader(client, HOSTS).held([f"{api.registry}/{repository(1)}"], iso(NOW)),
        ):
            with pytest.raises(ApiRefused, match="401"):
                await call


@pytest_twisted.ensureDeferred
async def test_a_release_counts_from_its_success_however_early_it_was_final(
    api: OpenBalenaApi, threads: Threads
) -> None:
    release = api.release(
        api.application(), {"web": (repository(1), None)}, finalized=NOW, status="running"
    )
    async with connected(api, threads) as client:
        assert await FleetReader(client, HOSTS).finalized(iso(NOW)) == []
        later = iso(NOW + timedelta(hours=2))
        api.tables["release"][release] |= {"status": "success", "update_timestamp": later}
        (found,) = await FleetReader(client, HOSTS).finalized(iso(NOW + timedelta(hours=1)))
    assert (found.finalized, found.updated) == (iso(NOW), later)


@pytest_twisted.ensureDeferred
async def test_images_exist_and_are_held_as_releases_and_devices_say(
    api: OpenBalenaApi, threads: Threads
) -> None:
    fleet = api.application()
    old = NOW - timedelta(days=90)
    running, _idle, pinned, wanted, fresh, gone = (
        api.release(fleet, {"web": (repository(n), None)}, finalized=old) for n in range(6)
    )
    (device,) = api.devices(running)
    api.tables["device"][device]["pinned"] = pinned
    api.tables["application"][fleet]["should_be_running__release"] = wanted
    api.tables["release"][fresh]["is_finalized_at__date"] = iso(NOW)
    api.delete_release(gone)
    locations = {f"{api.registry}/{repository(n)}" for n in range(7)}
    async with connected(api, threads) as client:
        reader = FleetReader(client, HOSTS)
        existing = await reader.existing(locations)
        held = await reader.held(locations, iso(NOW - timedelta(days=7)))
        fleets = await reader.fleets([fleet, 999])
    assert existing == {f"{api.registry}/{repository(n)}" for n in range(5)}
    assert held == existing - {f"{api.registry}/{repository(1)}"}
    assert [(one.name, one.tracked, one.devices) for one in fleets.values()] == [("acme", True, 1)]
