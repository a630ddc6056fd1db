"""Leases in a Redis that others write to."""

from __future__ import annotations

from typing import Any, cast

import pytest
import pytest_twisted
from twisted.python.threadpool import ThreadPool

from obdelta.builds.replicas.leases import Held, Leases
from obdelta.builds.replicas.redis_connection import Connection
from obdelta.concurrency.tasks import Threads
from obdelta.errors import SharedUnavailable
from tests.support.leases import finished, is_lost, redis, replica, taken
from tests.support.redis import RunningRedis
from tests.support.web import reactor

__all__ = ["redis"]


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
