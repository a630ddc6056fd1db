"""The Redis connection: short bounded queries in threads; fails at once while Redis is unavailable.

The client is redis-py, which blocks; queries are small, and rare beside the requests of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.concurrency.tasks import Threads
from obdelta.errors import SharedUnavailable

log = Logger()

CONNECT_SECONDS = ANSWER_SECONDS = 2.0
QUERY_TIMEOUT = 5.0
"""Seconds for a whole query: it includes what the first two do not bound (a resolver, a busy
thread).
"""
UNAVAILABLE_SECONDS = 2.0
"""Seconds after a failure in which no query is sent."""
LOOK_EVERY = 5.0
"""Seconds between two availability checks, so that readiness is known even without queries."""


def connect(
    host: str,
    port: int,
    database: int,
    username: str | None,
    password: str | None,
    *,
    tls: bool,
    ca: Path | None,
) -> redis.Redis:
    """Returns a client that has not connected yet; with TLS the server's name is checked against
    its certificate.
    """
    secure: dict[str, Any] = {}
    if tls:
        secure = {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
        if ca is not None:
            secure["ssl_ca_certs"] = str(ca)
    return redis.Redis(
        host=host,
        port=port,
        db=database,
        username=username,
        password=password,
        socket_connect_timeout=CONNECT_SECONDS,
        socket_timeout=ANSWER_SECONDS,
        # One retry on a new connection: a server that was restarted has closed the old ones, and
        # one that became a replica keeps them.
        retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),
        retry_on_error=[redis.exceptions.ReadOnlyError],
        client_name="obdelta",
        **secure,
    )


class Connection:
    """Sends queries to Redis; raises SharedUnavailable. ``where`` is host and port, for people."""

    def __init__(
        self, client: redis.Redis, where: str, threads: Threads, clock: IReactorTime
    ) -> None:
        self.where = where
        self._client, self._threads, self._clock = client, threads, clock
        self._problem: str | None = None
        self._until, self._found = float("-inf"), ""
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock

    @property
    def problem(self) -> str | None:
        """Why Redis is unavailable, one line; None if the last query was answered."""
        return self._problem

    def watch(self) -> None:
        """Checks Redis at once and then regularly, until :meth:`close`."""
        self._looking.start(LOOK_EVERY)

    def _look(self) -> Deferred[None]:
        return ensureDeferred(self._ping())

    async def _ping(self) -> None:
        try:
            await self.script("return redis.call('PING')", [], [])
        except SharedUnavailable as error:
            log.debug("{reason}", reason=str(error))

    async def script(
        self, text: str, keys: Sequence[str], values: Sequence[str | int | bytes]
    ) -> Any:
        """Returns a Lua script's result: ints, bytes, lists of them, None. The script runs as a
        whole or not at all.
        """
        if self._clock.seconds() < self._until:
            raise SharedUnavailable(self._found)
        query = ensureDeferred(self._threads.run(self._send_query, text, list(keys), list(values)))
        query.addTimeout(QUERY_TIMEOUT, self._clock, onTimeoutCancel=_too_slow)
        try:
            answer = await query
        except SharedUnavailable as error:
            self._failed(error.why)
            raise
        if self._problem is not None:
            log.info("Redis at {where} answers again", where=self.where)
            self._problem = None
        return answer

    def _failed(self, why: str) -> None:
        if self._problem is None:
            log.warn(
                "Redis at {where} is unavailable: {why}: this replica works alone",
                where=self.where,
                why=why,
            )
        self._problem = self._found = why
        self._until = self._clock.seconds() + UNAVAILABLE_SECONDS

    def _send_query(self, text: str, keys: list[str], values: list[str | int | bytes]) -> Any:
        if self._clock.seconds() < self._until:
            # Another query found it unavailable while this one waited for a thread.
            raise SharedUnavailable(self._found)
        try:
            return self._client.eval(text, len(keys), *keys, *values)
        # Any exception: on invalid answers redis-py raises more than its own errors.
        except Exception as error:
            self._found, self._until = why(error), self._clock.seconds() + UNAVAILABLE_SECONDS
            raise SharedUnavailable(self._found) from error

    async def close(self) -> None:
        """Ends the checks and the connections; no query may follow."""
        if self._looking.running:
            self._looking.stop()
        await self._threads.run(self._client.close)


def why(error: Exception) -> str:
    """Returns one line that holds no secret: servers' messages may repeat what they received."""
    if isinstance(error, redis.AuthenticationError):
        return "it refuses our name or password"
    if isinstance(error, redis.TimeoutError):
        return "it does not answer in time"
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return "it is a read-only replica"
    if isinstance(error, redis.OutOfMemoryError):
        return "its memory is full (maxmemory)"
    if isinstance(error, redis.ResponseError):
        code = str(error).split(" ", 1)[0]
        return (
            f"it answers {code}"
            if code.isascii() and code.isupper() and code.isalpha() and len(code) < 16
            else "it answers an error"
        )
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return "the connection failed"


def _too_slow(_result: object, _seconds: float) -> Any:
    raise SharedUnavailable("it does not answer in time")
