"""Leases through a real redis-server: one holder, lost in time, fenced; and the behaviour while
Redis is away, stalls or sends false data.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock, deferLater
from twisted.python.threadpool import ThreadPool

from obdelta.builds.publish.publish_image import delta_tag
from obdelta.builds.replicas import outcomes
from obdelta.builds.replicas.leases import Done, Held, Lease, Leases
from obdelta.builds.replicas.redis_connection import Connection, connect
from obdelta.concurrency.threads import Threads
from obdelta.errors import SharedUnavailable
from obdelta.oci import Digest
from obdelta.settings.address_parsers import RedisUrl, redis_url
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Outcome
from tests.support.redis import RunningRedis, running_redis
from tests.support.tokens import make_certificate, make_key, private_pem
from tests.support.web import reactor


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def connected(
    url: str, ca: Path | None = None, clock: IReactorTime = reactor
) -> AsyncIterator[Connection]:
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
    """Yields one replica's leases; with a Clock that stands still the replica is dead, and renews
    nothing.
    """
    async with connected(redis.url) as connection:
        leases = Leases(connection, prefix, seconds, clock)
        yield leases
        await leases.close()


def is_lost(lease: Lease) -> bool:
    return lease.lost


def find_problem(connection: Connection) -> str | None:
    return connection.problem


async def taken(leases: Leases, name: str) -> Lease:
    found = await leases.take(name)
    assert isinstance(found, Lease)
    return found


async def finished(leases: Leases, name: str) -> Done:
    found = await leases.take(name)
    assert isinstance(found, Done)
    return found


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
    async with replica(redis, 0.5, stopped) as dead, replica(redis, 0.5) as alive:
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
async def test_leases_survive_a_redis_that_restarts_empty(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        async with replica(redis, 0.6) as one, replica(redis, 0.6) as other:
            first, waiting = (
                await taken(one, "work"),
                ensureDeferred(other.wait_until_free("work", 60)),
            )
            redis.stop()
            with pytest.raises(SharedUnavailable):
                await one.take("more")
            # From now on it fails at once: no device waits for a Redis that is known to be away.
            began = reactor.seconds()
            for _ in range(100):
                with pytest.raises(SharedUnavailable):
                    await one.take("more")
            assert reactor.seconds() - began < 1.9
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


KEY = DeltaKey("v3", 7, Digest.of(b"base"), Digest.of(b"target"))


ROW = DeltaRow(KEY, "v2/a", "v2/b", delta_tag(KEY), Digest.of(b"c"), 100, 10, 1.5, 5)


def changed(**changes: object) -> bytes:
    """Returns a finished delta as a replica writes it, with these values replaced."""
    return json.dumps(json.loads(outcomes.text_of_row(ROW)) | changes).encode()


def verdict(outcome: object, reason: object) -> bytes:
    return json.dumps({"format": 1, "outcome": outcome, "reason": reason}).encode()


def test_outcomes_are_read_as_they_were_written() -> None:
    text = outcomes.text_of_row(replace(ROW, details={"layers": [{"n": 1}] * 10_000})).encode()
    assert outcomes.read(text, KEY) == ROW and len(text) < 1000
    assert outcomes.read(text, DeltaKey("v3", 8, KEY.base, KEY.target)) is None
    written = outcomes.text_of_verdict(Outcome.TOO_LARGE, "why" * 10_000).encode()
    assert outcomes.read(written, KEY) == (Outcome.TOO_LARGE, ("why" * 10_000)[:500])


def test_a_reason_is_one_line_without_control_characters() -> None:
    found = outcomes.read(verdict("error", "a\nb\x1b[31mc\u202ed\u0085\ud800é"), KEY)
    assert found == (Outcome.ERROR, "a?b?[31mc?d??é")


NONSENSE: list[bytes] = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'{"format": 2}',
    b'{"format": 1}',
    b"\xff\xfe",
    b'{"format": 1, "outcome": "\xc3"}',
    b"[" * 16_000,
    b'{"a":' * 3_000,
    b'{"format": 1, "outcome": ' + b"[" * 10_000,
    b"9" * 10_000,
    b'"' + b"x" * (1 << 20),
    verdict("?", "why"),
    verdict(None, "why"),
    verdict("error", None),
    verdict("error", ["why"]),
    verdict(["error"], "why"),
    changed(kind="v2"),
    changed(kind=["v3"]),
    changed(recipe=8),
    changed(recipe="7"),
    changed(recipe=True),
    changed(base="sha256:"),
    changed(target=str(KEY.base)),
    changed(content=None),
    changed(content=7),
    changed(base_repository="a\nb"),
    changed(base_repository=7),
    changed(target_repository="x" * 300),
    changed(tag=None),
    changed(tag="a b"),
    changed(tag="x" * 200),
    changed(tag={}),
    changed(full_bytes=-1),
    changed(full_bytes=10**30),
    changed(full_bytes=1.5),
    changed(full_bytes=True),
    changed(delta_bytes="1"),
    changed(seconds=float("nan")),
    changed(seconds=float("inf")),
    changed(seconds=10**400),
    changed(created=-5),
    changed(created=1e300),
    changed(seconds=True),
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_malformed_text_is_no_outcome(text: bytes) -> None:
    assert outcomes.read(text, KEY) is None


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.floats() | st.text() | st.integers(), st.lists).map(
        lambda value: json.dumps({"format": 1, "outcome": value, "reason": value}).encode()
    )
)
def test_reading_any_text_raises_nothing(text: bytes) -> None:
    found = outcomes.read(text, KEY)
    assert found is None or isinstance(found, tuple)


# -- a Redis that others write to --------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_forged_lease_is_ignored(redis: RunningRedis) -> None:
    async with replica(redis, prefix="p:") as leases:
        for name, poison in {
            "without expiry": ["SET", "p:lease:without expiry", "x"],
            "for a year": ["SET", "p:lease:for a year", "x", "EX", "31536000"],
            "too long": ["SET", "p:lease:too long", "x" * 1000, "EX", "10"],
            "another type": ["SADD", "p:lease:another type", "x"],
            "a hash": ["HSET", "p:lease:a hash", "x", "y"],
        }.items():
            redis.ask(*poison)
            await leases.wait_until_free(name, 60)
            lease = await taken(leases, name)
            redis.ask("DEL", f"p:lease:{name}")
            redis.ask(*poison)
            await leases._renew()
            assert not is_lost(lease) and await leases.finish(lease, "done", 60), name


@pytest_twisted.ensureDeferred
async def test_a_wait_for_an_endless_lease_ends(redis: RunningRedis) -> None:
    async with replica(redis, prefix="p:") as leases:
        redis.ask("SET", "p:lease:work", "x", "EX", "30")
        await leases.wait_until_free("work", 0.3)
        with pytest.raises(Held):
            await leases.take("work")
        assert leases._watched == {}
        redis.ask("DEL", "p:lease:work")


@pytest_twisted.ensureDeferred
async def test_a_forged_result_is_ignored(redis: RunningRedis) -> None:
    async with replica(redis, prefix="p:") as leases:
        key = "p:result:work"
        for poison in (
            [["HSET", key, "text", "x", "number", "1"]],
            [["HSET", key, "text", "x", "number", "1"], ["EXPIRE", key, "31536000"]],
            [["HSET", key, "text", "x"], ["EXPIRE", key, "60"]],
            [["HSET", key, "number", "1"], ["EXPIRE", key, "60"]],
            [["HSET", key, "text", "x", "number", "nan"], ["EXPIRE", key, "60"]],
            [["HSET", key, "text", "x", "number", "9" * 19], ["EXPIRE", key, "60"]],
            [["HSET", key, "text", "x", "number", "-1"], ["EXPIRE", key, "60"]],
            [["HSET", key, "text", "x", "number", "1" * 1000], ["EXPIRE", key, "60"]],
            [["HSET", key, "text", "x" * 20_000, "number", "1"], ["EXPIRE", key, "60"]],
            [
                [
                    "EVAL",
                    (
                        "redis.call('HSET', KEYS[1], 'number', 1, 'text',"
                        " string.rep(string.rep('x', 65536), 800))"
                    ),
                    "1",
                    key,
                ],
                ["EXPIRE", key, "60"],
            ],
            [["SET", key, "x", "EX", "60"]],
            [["RPUSH", key, "x"], ["EXPIRE", key, "60"]],
        ):
            for words in poison:
                redis.ask(*words)
            lease = await taken(leases, "work")
            for words in poison:
                redis.ask(*words)
            await leases._renew()
            assert not is_lost(lease) and await leases.finish(lease, "done", 60), poison
            assert (await finished(leases, "work")).text == b"done"
            redis.ask("DEL", key)


@pytest.mark.parametrize(
    "value", ["abc", "9" * 19, "1e308", "inf", "nan", "-7", "9" * 1000, "0x10"]
)
@pytest_twisted.ensureDeferred
async def test_the_last_lease_number_may_be_any_text(redis: RunningRedis, value: str) -> None:
    async with replica(redis, prefix="p:") as leases:
        redis.ask("SET", "p:number", value)
        first = await taken(leases, "one")
        assert (await taken(leases, "two")).number > first.number > 10**15
        assert first.number < 10**16
    async with replica(redis, prefix="p:") as leases:
        redis.ask("DEL", "p:number")
        redis.ask("RPUSH", "p:number", "x")
        await taken(leases, "three")


class Liar:
    """A double of redis-py's client: it returns any answer."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def eval(self, *_: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        None,
        7,
        b"taken",
        [],
        [b"taken"],
        [b"taken", b"x"],
        [b"taken", b"1" * 5000],
        [b"done", b"x"],
        [b"done", 1, 2],
        [[[]]],
        {},
        RecursionError("deep"),
        UnicodeDecodeError("utf-8", b"", 0, 1, "bad"),
        ValueError("no int"),
    ],
    ids=range(14),
)
@pytest_twisted.ensureDeferred
async def test_a_malformed_answer_of_redis_is_a_transient_error(answer: object) -> None:
    pool = ThreadPool(0, 2)
    pool.start()
    connection = Connection(cast(Any, Liar(answer)), "h:1", Threads(reactor, pool), reactor)
    leases = Leases(connection, "t:", 20, reactor)
    try:
        with pytest.raises(SharedUnavailable):
            await leases.take("work")
    finally:
        await leases.close()
        await connection.close()
        pool.stop()


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
