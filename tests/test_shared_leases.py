"""Leases through a real redis-server: one holder, lost in time, fenced; and what happens while Redis is away, stalls or lies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock, deferLater
from twisted.python.threadpool import ThreadPool

from obdelta.builds.delta_image import delta_tag
from obdelta.errors import SharedUnavailable
from obdelta.oci import Digest
from obdelta.settings.values import RedisUrl, redis_url
from obdelta.shared import outcomes
from obdelta.shared.connection import Connection, connect
from obdelta.shared.leases import Done, Held, Lease, Leases
from obdelta.store.rows import DeltaKey, DeltaRow, Outcome
from obdelta.store.threads import Threads
from tests.parts.redis import RunningRedis, running_redis
from tests.parts.tokens import make_certificate, make_key, private_pem
from tests.parts.web import reactor


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def connected(url: str, ca: Path | None = None, clock: IReactorTime = reactor) -> AsyncIterator[Connection]:
    it: RedisUrl = redis_url(url)
    pool = ThreadPool(0, 2)
    pool.start()
    client = connect(it.host, it.port, it.database, it.username, it.password, tls=it.tls, ca=ca)
    connection = Connection(client, f"{it.host}:{it.port}", Threads(reactor, pool), clock)
    try:
        yield connection
    finally:
        await connection.close()
        pool.stop()


@asynccontextmanager
async def replica(
    redis: RunningRedis, seconds: float = 20.0, clock: IReactorTime = reactor, prefix: str = "t:"
) -> AsyncIterator[Leases]:
    """One replica's leases; with a Clock that stands still it is one that has died: nothing is renewed."""
    async with connected(redis.url) as connection:
        leases = Leases(connection, prefix, seconds, clock)
        yield leases
        await leases.close()


def is_lost(lease: Lease) -> bool:
    return lease.lost


def problem_of(connection: Connection) -> str | None:
    return connection.problem


async def taken(leases: Leases, name: str) -> Lease:
    found = await leases.take(name)
    assert isinstance(found, Lease)
    return found


@pytest_twisted.ensureDeferred
async def test_one_holder_and_the_others_learn_of_its_result(redis: RunningRedis) -> None:
    async with replica(redis) as one, replica(redis) as other, replica(redis, prefix="elsewhere:") as stranger:
        lease = await taken(one, "work")
        with pytest.raises(Held):
            await other.take("work")
        assert isinstance(await other.take("other work"), Lease)
        await taken(stranger, "work")
        waiting = ensureDeferred(other.over("work"))
        gone = ensureDeferred(other.over("work"))
        gone.cancel()
        with pytest.raises(CancelledError):
            await gone
        assert await one.finish(lease, "é finished", 60)
        await waiting
        assert await other.take("work") == Done("é finished")
        # Forgotten by whoever finds that it does not hold any more, but never what came after it.
        await other.forget("work", Done("something else"))
        await other.forget("work", Done("é finished"))
        later = await taken(other, "work")
        assert later.number > lease.number
        await other.release(later)
        assert isinstance(await one.take("work"), Lease)
    # Whoever ends gives back what it held.
    assert redis.ask("KEYS", "*lease*") == ""


@pytest_twisted.ensureDeferred
async def test_a_dead_holder_loses_its_lease_and_can_do_no_harm_later(redis: RunningRedis) -> None:
    stopped = Clock()
    async with replica(redis, 0.5, stopped) as dead, replica(redis, 0.5) as alive:
        old = await taken(dead, "work")
        with pytest.raises(Held):
            await alive.take("work")
        await alive.over("work")
        new = await taken(alive, "work")
        assert new.number > old.number
        # It comes back to life, and finds that it has been overtaken.
        await dead._renew()
        assert is_lost(old) and not is_lost(new)
        assert not await dead.finish(old, "stale", 60)
        await alive._renew()
        assert not is_lost(new) and await alive.finish(new, "right", 60)
        assert await dead.take("work") == Done("right")
        # Neither can one that did not notice: the result's number is larger than its own.
        again = Lease("work", "x" * 32, old.number, 0.0)
        assert not await dead.finish(again, "stale", 60)
        dead._mine.add(again)
        await dead._renew()
        assert again.lost and await alive.take("work") == Done("right")


@pytest_twisted.ensureDeferred
async def test_a_lease_is_renewed_for_as_long_as_it_is_needed(redis: RunningRedis) -> None:
    async with replica(redis, 0.4) as one, replica(redis, 0.4) as other:
        lease = await taken(one, "long")
        first = lease.until
        while lease.until < first + 3 * 0.4:
            with pytest.raises(Held):
                await other.take("long")
        assert not lease.lost
        await one.release(lease)
        await taken(other, "long")


@pytest_twisted.ensureDeferred
async def test_redis_that_goes_away_and_comes_back_with_nothing(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        async with replica(redis, 0.6) as one, replica(redis, 0.6) as other:
            first, waiting = await taken(one, "work"), ensureDeferred(other.over("work"))
            redis.stop()
            with pytest.raises(SharedUnavailable):
                await one.take("more")
            # At once from now on: no device waits for a server that is known to be away.
            began = reactor.seconds()
            for _ in range(100):
                with pytest.raises(SharedUnavailable):
                    await one.take("more")
            assert reactor.seconds() - began < 1.9
            # Nobody is believed to hold anything once it has been away for a lease's time.
            await waiting
            await one._renew()
            assert is_lost(first)
            redis.start()
            while is_lost(first):
                await one._renew()
                await deferLater(reactor, 0.05)
            # Redis had forgotten the lease: its holder has it again, and the number still grows.
            with pytest.raises(Held):
                await until_answered(other, "work")
            assert (await until_answered(other, "next")).number > first.number
            assert await one.finish(first, "done", 60)


async def until_answered(leases: Leases, name: str) -> Lease:
    while True:
        try:
            return await taken(leases, name)
        except SharedUnavailable:
            await deferLater(reactor, 0.05)


@pytest_twisted.ensureDeferred
async def test_redis_that_stalls_holds_nobody_up_for_long(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        async with connected(redis.url) as connection:
            assert await connection.script("return 7", [], []) == 7 and problem_of(connection) is None
            redis.stall(True)
            asked = [ensureDeferred(connection.script("return 7", [], [])) for _ in range(20)]
            for question in asked:
                with pytest.raises(SharedUnavailable, match="does not answer in time"):
                    await question
            assert problem_of(connection) == "it does not answer in time"
            redis.stall(False)
            while problem_of(connection) is not None:
                await connection._ping()
                await deferLater(reactor, 0.05)


@pytest_twisted.ensureDeferred
async def test_passwords_and_tls(tmp_path: Path) -> None:
    key = make_key("ES256")
    (tmp_path / "cert.pem").write_bytes(make_certificate(key, "localhost"))
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    (tmp_path / "other.pem").write_bytes(make_certificate(make_key("ES256"), "localhost"))
    options = [
        "--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem"),
        "--tls-auth-clients", "no", "--requirepass", "s:cr/t@",
    ]  # fmt: skip
    with running_redis(tmp_path / "redis", *options, tls=True) as redis:
        url = f"rediss://:s%3Acr%2Ft%40@localhost:{redis.port}/3"
        async with connected(url, tmp_path / "cert.pem") as connection:
            assert await connection.script("return redis.call('PING')['ok']", [], []) == b"PONG"
        for wrong, ca, said in (
            (url, tmp_path / "other.pem", "certificate"),
            (url.replace("localhost", "127.0.0.1"), tmp_path / "cert.pem", "certificate"),
            (url.replace("cr%2Ft", "crt"), tmp_path / "cert.pem", "name or password"),
            (f"rediss://localhost:{redis.port}", tmp_path / "cert.pem", "NOAUTH|name or password"),
            (url.replace("rediss:", "redis:"), None, "[Cc]onnection"),
        ):
            async with connected(wrong, ca) as connection:
                with pytest.raises(SharedUnavailable, match=said) as caught:
                    await connection.script("return 1", [], [])
                assert "s:cr" not in str(caught.value) and "%" not in str(caught.value)


KEY = DeltaKey("v3", 7, Digest.of(b"base"), Digest.of(b"target"))


def test_outcomes_survive_the_way_and_nonsense_is_nothing() -> None:
    row = DeltaRow(
        KEY, "v2/a", "v2/b", delta_tag(KEY), Digest.of(b"c"), 100, 10, 1.5, 5, details={"layers": [{"n": 1}]}
    )
    text = outcomes.text_of_row(row)
    assert outcomes.read(text, KEY) == row
    assert outcomes.read(text, DeltaKey("v3", 8, KEY.base, KEY.target)) is None
    assert outcomes.read(outcomes.text_of_verdict(Outcome.NOT_WORTH, "why"), KEY) == (Outcome.NOT_WORTH, "why")
    for nonsense in ("", "null", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "outcome": "?"}',
                     text.replace('"sha256:', '"sha'), text.replace('"details": {', '"details": 7, "x": {'),
                     text.replace('"kind": "v3"', '"kind": "v2"')):  # fmt: skip
        assert outcomes.read(nonsense, KEY) is None


def test_urls() -> None:
    assert redis_url("redis://redis") == RedisUrl("redis", 6379, 0, None, None, False)
    full = redis_url("rediss://me:p%40ss@[::1]:7000/12")
    assert full == RedisUrl("::1", 7000, 12, "me", "p@ss", True)
    assert "p@ss" not in repr(full)
    for wrong in ("redis", "http://redis", "redis://", "redis://h/x", "redis://h/-1", "redis://h?ssl_cert_reqs=none",
                  "redis://h#f", "redis://h:99999", "unix:///run/redis.sock"):  # fmt: skip
        with pytest.raises(ValueError, match=r".*"):
            redis_url(wrong)
