"""Servers that share a registry and a Redis, and a device that asks one of them and pulls from
another. The fixtures are in ``tests/server/conftest.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device, Update
from obdelta.oci import Reference
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.server import RunningServer
from tests.support.stack import Stack

NAME = "http://127.0.0.1:7"
"""As devices know all of the servers, behind one balancer."""
PASSWORD = "very-secret"
Start = Callable[..., RunningServer]


@contextmanager
def shared_servers(stack: Stack, redis: str, **every: Any) -> Iterator[Start]:
    """Yields a function that starts a server: ``start("a", publish="registry")``. ``redis`` is a
    URL, ``more`` more of a server's environment, and ``every`` has the options of all servers.
    """
    with ExitStack() as running:

        def start(state: str, more: Mapping[str, str] = {}, **options: Any) -> RunningServer:
            environment = {"OBDELTA_SHARED": redis, **more}
            server = stack.server(
                state, environment=environment, public_url=NAME, **every, **options
            )
            return running.enter_context(server)

        yield start


def update(stack: Stack, requested: RunningServer, pulled: str | None, work: Path) -> Update:
    """Updates a device that sends its request to one server and pulls from another (None: from the
    host in the answer).
    """
    work.mkdir(parents=True)
    token, http = stack.token(), Http(timeout=60)
    direct = Engine(http, token=token, registry=stack.registry.url)
    source, target = (
        f"{stack.registry.host}/{name}" for name in (BASE_REPOSITORY, TARGET_REPOSITORY)
    )
    base = Device(http, direct, requested.url, token=token).load_base(Reference.parse(source), work)
    device = Device(http, Engine(http, token=token, registry=pulled), requested.url, token=token)
    done = device.update(base, source, target, work)
    assert done.is_delta and done.image_id == stack.pair.target.image_id
    return done
