"""Fixtures of the tests whose servers share a registry and a Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import make_pair
from tests.support.redis import RunningRedis, running_redis
from tests.support.shared_servers import PASSWORD, Start, shared_servers
from tests.support.stack import Stack, running_stack


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(tmp_path / "stack", make_pair(tmp_path / "pair", size=1 << 18)) as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RunningRedis]:
    with running_redis(tmp_path / "redis", "--requirepass", PASSWORD) as running:
        yield running


@pytest.fixture
def shared_url(redis: RunningRedis) -> str:
    """The value of ``shared``."""
    return redis.url.replace("://", f"://:{PASSWORD}@")


@pytest.fixture
def replica(stack: Stack, shared_url: str) -> Iterator[Start]:
    """Starts a replica: ``replica("a", publish="registry")``."""
    with shared_servers(stack, shared_url) as start:
        yield start


@pytest.fixture
def start(stack: Stack, shared_url: str) -> Iterator[Start]:
    """Starts a frontend, or a worker: ``start("w", worker=True)``."""
    with shared_servers(stack, shared_url, builds="workers") as running:
        yield running
