"""Leases through a real redis-server: one holder, lost in time, fenced; and the behaviour while
Redis is away or stalls.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.task import Clock, deferLater

from obdelta.builds.replicas import redis_connection
from obdelta.builds.replicas.leases import Done, Held, Lease, Leases
from obdelta.builds.replicas.redis_connection import Connection
from obdelta.errors import SharedUnavailable
from obdelta.settings.address_parsers import RedisUrl, redis_url
from tests.support.leases import connected, finished, is_lost, redis, replica, taken
from tests.support.redis import RunningRedis, running_redis
from tests.support.tokens import make_certificate, make_key, private_pem
from tests.support.web import reactor

__all__ = ["redis"]


def find_problem(connection: Connection) -> str | None:
    return connection.problem


@pytest_twisted.ensureDeferred
async def test_one_replica_holds_a_lease_and_the_others_get_its_result(redis: RunningRedis) -> None:
    async with (
        replica(redis) as one,
        replica(redis) as other,
        replica(redis, prefix="elsewhere:") as stranger,
    ):
        lease = await taken(one, "work")
        with pytest.raises(Held):
            await other.take("work")
        assert isinstance(await other.take("other work"), Lease)
        await taken(stranger, "work")
        waiting = ensureDeferred(other.wait_until_free("work", 60))
        gone = ensureDeferred(other.wait_until_free("work", 60))
        gone.cancel()
        with pytest.raises(CancelledError):
            await gone
        assert await one.finish(lease, "é finished", 60)
        await waiting
        done = await finished(other, "work")
        assert done.text.decode() == "é finished" and 50 < done.seconds <= 60
        # A holder that finds its lease lost forgets it, but never the lease that came after it.
        await other.forget("work", Done(b"something else", 1))
        await other.forget("work", done)
        later = await taken(other, "work")
        assert later.number > lease.number
        await other.release(later)
        assert isinstance(await one.take("work"), Lease)
    # A replica that ends releases its leases.
    assert redis.ask("KEYS", "*lease*") == ""


@pytest_twisted.ensureDeferred
async def test_a_dead_holder_loses_its_lease_and_cannot_change_the_next_one(
    redis: RunningRedis,
) -> None:
    stopped = Clock()
    async with replica(redis, 2.0, stopped) as dead, replica(redis, 2.0) as alive:
        old = await taken(dead, "work")
        with pytest.raises(Held):
            await alive.take("work")
        await alive.wait_until_free("work", 60)
        new = await taken(alive, "work")
        assert new.number > old.number
        # It works again, and finds that it was overtaken.
        await dead._renew()
        assert is_lost(old) and not is_lost(new)
        assert not await dead.finish(old, "stale", 60)
        await alive._renew()
        assert not is_lost(new) and await alive.finish(new, "right", 60)
        assert (await finished(dead, "work")).text == b"right"
        # A replica that did not notice cannot either: the result's number is larger than its own.
        again = Lease("work", "x" * 32, old.number, 0.0)
        assert not await dead.finish(again, "stale", 60)
        dead._held.add(again)
        await dead._renew()
        assert again.lost and (await finished(alive, "work")).text == b"right"


@pytest_twisted.ensureDeferred
async def test_a_lease_is_renewed_for_as_long_as_it_is_needed(redis: RunningRedis) -> None:
    async with replica(redis, 1.5) as one, replica(redis, 1.5) as other:
        lease = await taken(one, "long")
        first = lease.until
        while lease.until < first + 3 * 1.5:
            with pytest.raises(Held):
                await other.take("long")
        assert not lease.lost
        await one.release(lease)
        await taken(other, "long")


@pytest_twisted.ensureDeferred
async def test_leases_survive_a_redis_that_restarts_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_redis(tmp_path) as redis:
        async with replica(redis, 0.6) as one, replica(redis, 0.6) as other:
            first, waiting = (
                await taken(one, "work"),
                ensureDeferred(other.wait_until_free("work", 60)),
            )
            sent: list[object] = []
            with monkeypatch.context() as patch:
                patch.setattr(redis_connection, "UNAVAILABLE_SECONDS", 600.0)
                redis.stop()
                with pytest.raises(SharedUnavailable):
                    await one.take("more")
                # From now on it fails at once, without a query: no device waits for a Redis that
                # is known to be away.
                patch.setattr(one._connection, "_send_query", lambda *query: sent.append(query))
                for _ in range(100):
                    with pytest.raises(SharedUnavailable):
                        await one.take("more")
            assert sent == []
            one._connection._until = reactor.seconds()
            # A replica that was away for a lease's time holds nothing any more.
            await waiting
            await one._renew()
            assert is_lost(first)
            redis.start()
            while is_lost(first):
                await one._renew()
                await deferLater(reactor, 0.05)
            # Redis had lost the lease: its holder has it again, and the number still grows.
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
async def test_a_stalled_redis_delays_no_build_for_long(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        async with connected(redis.url) as connection:
            assert (
                await connection.script("return 7", [], []) == 7
                and find_problem(connection) is None
            )
            redis.stall(True)
            calls = [ensureDeferred(connection.script("return 7", [], [])) for _ in range(20)]
            for question in calls:
                with pytest.raises(SharedUnavailable, match="does not answer in time"):
                    await question
            assert find_problem(connection) == "it does not answer in time"
            redis.stall(False)
            while find_problem(connection) is not None:
                await connection._ping()
                await deferLater(reactor, 0.05)


@pytest_twisted.ensureDeferred
async def test_passwords_and_tls_of_redis_are_checked(tmp_path: Path) -> None:
    key = make_key("ES256")
    (tmp_path / "cert.pem").write_bytes(make_certificate(key, "localhost"))
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    (tmp_path / "other.pem").write_bytes(make_certificate(make_key("ES256"), "localhost"))
    options = [
        "--tls-cert-file",
        str(tmp_path / "cert.pem"),
        "--tls-key-file",
        str(tmp_path / "key.pem"),
        "--tls-auth-clients",
        "no",
        "--requirepass",
        "s:cr/t@",
    ]
    with running_redis(tmp_path / "redis", *options, tls=True) as redis:
        url = f"rediss://:s%3Acr%2Ft%40@localhost:{redis.port}/3"
        async with connected(url, tmp_path / "cert.pem") as connection:
            assert await connection.script("return redis.call('PING')['ok']", [], []) == b"PONG"
        for wrong, ca, message in (
            (url, tmp_path / "other.pem", "certificate"),
            (url.replace("localhost", "127.0.0.1"), tmp_path / "cert.pem", "certificate"),
            (url.replace("cr%2Ft", "crt"), tmp_path / "cert.pem", "name or password"),
            (f"rediss://localhost:{redis.port}", tmp_path / "cert.pem", "NOAUTH|name or password"),
            (url.replace("rediss:", "redis:"), None, "[Cc]onnection"),
        ):
            async with connected(wrong, ca) as connection:
                with pytest.raises(SharedUnavailable, match=message) as failure:
                    await connection.script("return 1", [], [])
                assert "s:cr" not in str(failure.value) and "%" not in str(failure.value)


def test_urls_of_redis_are_parsed() -> None:
    assert redis_url("redis://redis") == RedisUrl("redis", 6379, 0, None, None, False)
    full = redis_url("rediss://me:p%40ss@[::1]:7000/12")
    assert full == RedisUrl("::1", 7000, 12, "me", "p@ss", True)
    assert "p@ss" not in repr(full)
    for wrong in (
        "redis",
        "http://redis",
        "redis://",
        "redis://h/x",
        "redis://h/-1",
        "redis://h?ssl_cert_reqs=none",
        "redis://h#f",
        "redis://h:99999",
        "unix:///run/redis.sock",
    ):
        with pytest.raises(ValueError, match=r".*"):
            redis_url(wrong)
