"""Jobs as read from Redis: no code, and bounded, because other programs may write there."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import redis
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry

MAX_FIELD = 64 * 1024
"""Bytes of a field that is read, and of what it holds decompressed; ours have less than 4,000."""
_MAX_NUMBER = 1 << 60
_FIELDS: Final = frozenset(
    {
        "created_at",
        "data",
        "description",
        "ended_at",
        "enqueued_at",
        "failure_ttl",
        "last_heartbeat",
        "meta",
        "number_of_retries",
        "origin",
        "result_ttl",
        "retries_left",
        "started_at",
        "status",
        "timeout",
        "ttl",
        "worker_name",
    }
)
"""The fields of a job's hash that are read."""

# KEYS: a hash. ARGV: the most bytes of a field, names of fields. Longer fields count as absent, and
# so does another type: other programs may write to Redis.
_READ = """
local found = {}
if redis.call('TYPE', KEYS[1])['ok'] ~= 'hash' then return found end
for place = 2, #ARGV do
  local size = redis.call('HSTRLEN', KEYS[1], ARGV[place])
  if size > 0 and size <= tonumber(ARGV[1]) then
    found[#found + 1] = ARGV[place]
    found[#found + 1] = redis.call('HGET', KEYS[1], ARGV[place])
  end
end
return found
"""
# KEYS: a job's results, a stream. ARGV: the most bytes. RQ's type 1 is a success.
_RESULT = """
if redis.call('TYPE', KEYS[1])['ok'] ~= 'stream' then return false end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if not last then return false end
local fields = {}
for place = 1, #last[2], 2 do fields[last[2][place]] = last[2][place + 1] end
local value = fields['return_value']
if fields['type'] ~= '1' or not value or #value > tonumber(ARGV[1]) then return false end
return value
"""

# KEYS: executions by the time until which they count as alive. ARGV: the execution, seconds, XX for
# one that must be there already.
_BEAT = """
local last = tonumber(redis.call('TIME')[1]) + ARGV[2]
if ARGV[3] == 'XX' then return redis.call('ZADD', KEYS[1], 'XX', last, ARGV[1]) end
return redis.call('ZADD', KEYS[1], last, ARGV[1])
"""


class StartedJobs(StartedJobRegistry):
    """Jobs that workers run, by Redis's clock. RQ's own registry compares the clocks of different
    workers, so that one whose clock is ahead would take the jobs of the others for abandoned.
    """

    def add_execution(
        self, execution: Execution, pipeline: Any, ttl: int = 0, xx: bool = False
    ) -> int:
        """Records a sign of life, which counts for ``ttl`` seconds."""
        mode = "XX" if xx else ""
        return int(bool(pipeline.eval(_BEAT, 1, self.key, execution.composite_key, ttl, mode)))

    def cleanup(
        self, timestamp: float | None = None, exception_handlers: list[Any] | None = None
    ) -> None:
        """Queues jobs again that gave no sign of life in time, unless they have no retry left."""
        seconds, _ = self.connection.time()
        super().cleanup(seconds if timestamp is None else timestamp, exception_handlers)


class BuildJob(Job):
    """A job of RQ that names no code. ``build`` is set by the worker that runs it."""

    build: Callable[[], Any] | None = None

    def refresh(self) -> None:
        """Reads the job's hash. Raises NoSuchJobError if the hash is not that of a job."""
        self.restore(fields(read(self.connection, self.key, *sorted(_FIELDS))))

    def restore(self, raw_data: Mapping[bytes, bytes]) -> Any:
        """Reads only the known fields of a job's hash. Raises NoSuchJobError."""
        known = {
            name: value
            for name, value in raw_data.items()
            if name.decode("ascii", "replace") in _FIELDS
        }
        if b"data" in known:
            known[b"data"] = _inflated(known[b"data"])
        return super().restore(known)

    @property
    def started_job_registry(self) -> StartedJobs:
        """The jobs that workers have taken from this one's queue."""
        return StartedJobs(
            self.origin,
            connection=self.connection,
            job_class=BuildJob,
            serializer=self.serializer,
        )

    def _execute(self) -> Any:
        if self.build is None:
            raise InvalidJobOperation("only a worker runs it")
        return self.build()


def read(client: redis.Redis, key: str, *names: str) -> object:
    """Queries those fields of a hash that are not too long, in a pipeline or at once."""
    return client.eval(_READ, 1, key, str(MAX_FIELD), *names)


def fields(found: object) -> dict[bytes, bytes]:
    """Returns the fields in the answer to :func:`read`."""
    values = iter(found if isinstance(found, list) else ())
    return dict(zip(values, values, strict=False))


def _inflated(data: bytes) -> bytes:
    """Returns a job's function and arguments, which RQ compresses. Raises NoSuchJobError for what
    would take too much memory, or is no JSON.
    """
    try:
        inflater = zlib.decompressobj()
        found = inflater.decompress(data, MAX_FIELD)
    except zlib.error as error:
        raise NoSuchJobError("its data is not compressed") from error
    # RQ decompresses what it can, so it must not get compressed data once more.
    if not inflater.eof or not found.startswith(b"["):
        raise NoSuchJobError("its data is too long, or no JSON")
    return found


def read_result(client: redis.Redis, job_id: str) -> object:
    """Returns the result of a job that has succeeded, None for what no worker writes."""
    found = client.eval(_RESULT, 1, f"rq:results:{job_id}", str(MAX_FIELD))
    try:
        return json.loads(base64.b64decode(found)) if isinstance(found, bytes) else None
    except (ValueError, RecursionError):
        return None


def progress(meta: bytes | None) -> Mapping[str, object]:
    """Returns a build's progress, without fields that are invalid."""
    try:
        found = json.loads(meta or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        str(name)[:40]: value
        for name, value in list(found.items())[:16]
        if (isinstance(value, int | float) and abs(value) < _MAX_NUMBER)
        or (isinstance(value, str) and len(value) <= 80 and value.isprintable())
    }
