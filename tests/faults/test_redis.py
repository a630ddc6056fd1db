"""A Redis into which other programs write: every device gets its delta, or its target, and the
foreign data is not used for long.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from bench.registry import serving
from obdelta.builds.replicas.leases import prefix_of
from obdelta.builds.replicas.turns import name_of_key
from obdelta.delta.build import RECIPE
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaKey
from tests.support.fault_fleet import Fleet, Tally, check_store, make_fleet, repository, until_tidy
from tests.support.redis import RunningRedis, running_redis
from tests.support.server import running_server

UPDATES = 14
SEED = 63
Poison = Callable[[RunningRedis, str, str, str], object]
"""Writes to Redis; the keys of a pair's lease and result, and a text that a replica might have
written.
"""


def fields(
    redis: RunningRedis, key: str, text: str, number: str = "1", seconds: str = "600"
) -> None:
    redis.ask("HSET", key, "text", text, "number", number)
    redis.ask("EXPIRE", key, seconds)


POISONS: dict[str, Poison] = {
    "a lease without expiry": lambda redis, lease, result, text: redis.ask("SET", lease, "x"),
    "a lease for a year": lambda redis, lease, result, text: redis.ask(
        "SET", lease, "x", "EX", "31536000"
    ),
    "a lease of another type": lambda redis, lease, result, text: redis.ask("RPUSH", lease, "x"),
    "a lease for two seconds": lambda redis, lease, result, text: redis.ask(
        "SET", lease, "x", "EX", "2"
    ),
    "a delta that does not exist": lambda redis, lease, result, text: fields(redis, result, text),
    "a delta without expiry": lambda redis, lease, result, text: redis.ask(
        "HSET", result, "text", text, "number", "1"
    ),
    "another pair's delta": lambda redis, lease, result, text: fields(
        redis, result, text.replace('"v3"', '"v2"')
    ),
    "a number of 400 digits": lambda redis, lease, result, text: fields(
        redis, result, text, "9" * 400
    ),
    "numbers out of range": lambda redis, lease, result, text: fields(
        redis, result, text.replace("100", "1" + "0" * 300)
    ),
    "deep JSON": lambda redis, lease, result, text: fields(redis, result, "[" * 15_000),
    "50 MB": lambda redis, lease, result, text: redis.ask(
        "EVAL",
        "redis.call('HSET', KEYS[1], 'number', 1, 'text', string.rep(string.rep('x', 65536), 800))"
        " redis.call('EXPIRE', KEYS[1], 600)",
        "1",
        result,
    ),
    "bad UTF-8": lambda redis, lease, result, text: redis.ask(
        "EVAL",
        "redis.call('HSET', KEYS[1], 'number', 1, 'text', '\\255\\254') redis.call('EXPIRE',"
        " KEYS[1], 600)",
        "1",
        result,
    ),
    "a lease number that is text": lambda redis, lease, result, text: redis.ask(
        "SET", lease.partition("lease:")[0] + "number", "many"
    ),
    "a verdict": lambda redis, lease, result, text: fields(
        redis,
        result,
        json.dumps({"format": 1, "outcome": "not worth", "reason": "a\nfaked: line\x1b[2J"}),
    ),
}


def run_poisoned_redis(directory: Path, updates: int, tally: Tally, seed: int = SEED) -> None:
    """Runs updates, each with its own pair, about which something is written to Redis before the
    request.
    """
    source = random.Random(seed)
    state = directory / "state"
    with serving(directory / "registry") as registry, running_redis(directory / "redis") as redis:
        make_fleet(directory, registry, updates + 1)
        fleet, host = Fleet(registry), registry.partition("//")[2]
        with running_server(
            state,
            upstream=registry,
            environment={"OBDELTA_SHARED": redis.url},
            upstream_credentials="none",
            effort="fast",
            max_delta_ratio="10",
            registry_hosts=host,
        ) as server:
            poisons = list(POISONS)
            for number in range(updates):
                if number % len(poisons) == 0:
                    source.shuffle(poisons)
                poison = poisons[number % len(poisons)]
                lease, result, text = keys_of(fleet, host, number)
                POISONS[poison](redis, lease, result, text)
                tally.add(f"poisoned by {poison}")
                updated = fleet.update(server.url, number, deadline=30)
                if poison == "a verdict":
                    assert not updated.is_delta, "it is believed for as long as the key is there"
                    tally.add("full pulls by a forged verdict")
                    redis.ask("DEL", result)
                    updated = fleet.update(server.url, number, deadline=30)
                assert updated.is_delta
                tally.add("updates verified")
            until_tidy(state, server.operator_url)
            log = server.log
    tally.add("tracebacks in the log", log.count("Traceback"))
    tally.add(
        "forged lines in the log", sum(line.startswith("faked:") for line in log.splitlines())
    )
    tally.add("control characters in the log", log.count("\x1b"))
    tally.add("files compared with their digests", check_store(state))


def keys_of(fleet: Fleet, host: str, number: int) -> tuple[str, str, str]:
    """Returns the names of a pair's lease and result, and the text that a replica would write
    about its delta.
    """
    base, target = (fleet.manifest_digest(image) for image in (number, number + 1))
    key = DeltaKey("v3", RECIPE, base, target)
    name = name_of_key(key, repository(number), repository(number + 1))
    text = {
        "format": 1,
        "kind": "v3",
        "recipe": RECIPE,
        "base": str(base),
        "target": str(target),
        "base_repository": repository(number),
        "target_repository": repository(number + 1),
        "tag": "delta-0123456789abcdef",
        "content": str(Digest.of(b"nothing")),
        "full_bytes": 100,
        "delta_bytes": 100,
        "seconds": 1.0,
        "created": 100,
        "details": {},
    }
    prefix = prefix_of(host)
    return f"{prefix}lease:{name}", f"{prefix}result:{name}", json.dumps(text)


def test_a_poisoned_redis(tmp_path: Path) -> None:
    tally = Tally()
    run_poisoned_redis(tmp_path, UPDATES, tally)
    tally.show()
    assert tally.counts["updates verified"] == UPDATES == len(POISONS)
    for name in ("tracebacks", "forged lines", "control characters"):
        assert all(
            count == 0
            for what, count in tally.counts.items()
            if what.startswith(name) and "log" in what
        )
