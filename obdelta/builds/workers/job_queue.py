"""The job queue in Redis: RQ, with jobs that name no code. All calls block; run them in threads.

RQ keeps each job in a hash, and the IDs of those that wait in lists. Its own jobs name functions,
callbacks and web hooks, which anyone who can write to Redis could choose. A
:class:`obdelta.builds.workers.build_job.BuildJob` reads none of these: the worker decides what is
run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, InvalidJobOperation, NoSuchJobError
from rq.executions import ExecutionRegistry
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from obdelta.builds.workers import build_job
from obdelta.builds.workers.build_job import BuildJob

RETRIES = 3
"""How often a job is queued again when its worker dies. More would let one pair end every worker
in turn.
"""
RESULT_SECONDS = 300
"""Seconds for which a result stays in Redis. The registry has the delta for longer."""
WORKER_SECONDS = 15.0
"""Seconds without a sign of life after which no job is sent to a worker's own queue."""
BASE_SECONDS = 6 * 3600
"""Seconds for which the worker that has a base's index is known."""
_FUNCTION = "obdelta.build"
"""Written because RQ wants a name; it is never read."""
# KEYS: two lists, the job's hash. ARGV: job ID, the name of the second list's queue.
_MOVE = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[3], 'origin', ARGV[2])
redis.call('RPUSH', KEYS[2], ARGV[1])
return 1
"""
# KEYS: a list, the job's hash. ARGV: job ID, the name of the list's queue.
_RETURN = """
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('HSET', KEYS[2], 'origin', ARGV[2])
redis.call('RPUSH', KEYS[1], ARGV[1])
return 1
"""
# KEYS: workers by the time of their last sign of life. ARGV: worker, slots, version, seconds.
_ALIVE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[4])
redis.call('ZADD', KEYS[1], now, ARGV[1] .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
return 1
"""
# KEYS: workers. ARGV: seconds.
_WORKERS = """
local now = tonumber(redis.call('TIME')[1])
return redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], '+inf', 'LIMIT', 0, 1000)
"""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Redis has it. ``result`` is set if it has finished."""

    status: str
    progress: Mapping[str, object] = field(default_factory=dict)
    result: object = None


@dataclass(frozen=True, slots=True)
class Load:
    """The numbers of jobs that wait, and the slots of the workers that are alive. ``others``:
    workers of another version, which take no jobs of this server.
    """

    devices: int = 0
    prepared: int = 0
    slots: int = 0
    workers: int = 0
    others: int = 0


class JobQueue:
    """Jobs of one registry's deltas. Every method raises :class:`redis.RedisError`.

    ``prefix`` begins all keys of obdelta, ``host`` is the registry's name. A worker takes jobs from
    its own queue first, then those that devices wait for, then those that are prepared. It builds
    those of its own ``version`` (:func:`obdelta.builds.workers.build_requests.version_of`).
    """

    def __init__(self, client: redis.Redis, prefix: str, host: str, version: str) -> None:
        self._client, self._prefix, self.version = client, prefix, version
        self.devices, self.prepared = (
            self._queue(f"obdelta:{host}:devices"),
            self._queue(f"obdelta:{host}:prepared"),
        )
        self._host = host

    def own(self, worker: str) -> Queue:
        """Returns the queue of one worker, for jobs whose base it has."""
        return self._queue(f"obdelta:{self._host}:at:{worker}")

    def _queue(self, name: str) -> Queue:
        return Queue(name, connection=self._client, job_class=BuildJob, serializer=JSONSerializer)

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"

    # -- frontends

    def job_id(self, name: str) -> str:
        """Returns the ID of the job for this work, the same on all frontends: one job at a time."""
        return f"{self._prefix.rstrip(':').replace(':', '-')}-{name}"

    def put(self, name: str, request: object, base: str, *, urgent: bool) -> None:
        """Enqueues the work, or joins it if it waits or runs.

        ``base`` names the base's layers: a worker that has their index gets the job.
        """
        if not urgent:
            queue = self.prepared
        elif (worker := self._worker_of(base)) is not None:
            queue = self.own(worker)
        else:
            queue = self.devices
        job_id = self.job_id(name)
        for _ in range(2):
            with contextlib.suppress(DuplicateJobError):
                queue.enqueue_call(
                    _FUNCTION,
                    args=(request, self.version),
                    job_id=job_id,
                    description=name,
                    timeout=-1,
                    result_ttl=RESULT_SECONDS,
                    failure_ttl=RESULT_SECONDS,
                    retry=Retry(max=RETRIES),
                    unique=True,
                )
                return
            if not self._ended(job_id):
                if urgent:
                    self._move(job_id, self.prepared, self.devices)
                return

    def _ended(self, job_id: str) -> bool:
        """Returns whether an earlier job for the same work has ended, and deletes its keys then."""
        try:
            job = BuildJob.fetch(job_id, connection=self._client, serializer=JSONSerializer)
        except (NoSuchJobError, ValueError):
            self._client.delete(f"rq:job:{job_id}")
            return True
        if job.get_status(refresh=False) in (JobStatus.QUEUED, JobStatus.STARTED):
            return False
        job.delete()
        return True

    def _worker_of(self, base: str) -> str | None:
        found = self._client.get(self._key(f"base:{base}"))
        alive = {name for name, _ in self._alive()[0]}
        name = found.decode("ascii", "replace") if isinstance(found, bytes) else ""
        return name if name in alive else None

    def spread(self, name: str, worker_queue: str) -> None:
        """Moves a job from a worker's own queue to the one of all workers."""
        self._move(self.job_id(name), self._queue(worker_queue), self.devices)

    def _move(self, job_id: str, source: Queue, target: Queue) -> bool:
        keys = [source.key, target.key, f"rq:job:{job_id}"]
        return bool(self._client.eval(_MOVE, 3, *keys, job_id, target.name))

    def states(self, names: Sequence[str]) -> dict[str, tuple[JobState | None, str]]:
        """Returns the state of each job, None for one that Redis does not have, and its queue."""
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                key = f"rq:job:{self.job_id(name)}"
                build_job.read(pipeline, key, "status", "meta", "origin")
            found = pipeline.execute()
        states: dict[str, tuple[JobState | None, str]] = {}
        for name, read in zip(names, found, strict=True):
            fields = build_job.fields(read)
            queue = fields.get(b"origin", b"").decode("utf-8", "replace")
            state = self._state(name, fields.get(b"status"), fields.get(b"meta"))
            states[name] = (state, queue)
        return states

    def _state(self, name: str, status: bytes | None, meta: bytes | None) -> JobState | None:
        if status is None:
            return None
        kind = status.decode("ascii", "replace")
        if kind != JobStatus.FINISHED.value:
            return JobState(kind, build_job.progress(meta))
        return JobState(kind, result=build_job.read_result(self._client, self.job_id(name)))

    def is_lost(self, name: str, queue: str) -> bool:
        """Returns whether a job counts as queued and is in no queue, because its worker died just
        after it took the job, or counts as started and no worker runs it, because Redis lost a
        part of its data.
        """
        job_id = self.job_id(name)
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hget(f"rq:job:{job_id}", "status")
            for each in (self._queue(queue), self.devices, self.prepared):
                pipeline.lpos(each.key, job_id)
            pipeline.exists(ExecutionRegistry.key_template.format(job_id))
            status, *places, runs = pipeline.execute()
        if status == b"started":
            return not runs
        return status == b"queued" and all(place is None for place in places)

    def cancel(self, name: str) -> None:
        """Cancels a job: one that waits is removed, and a worker ends one that runs."""
        with contextlib.suppress(NoSuchJobError, InvalidJobOperation, ValueError):
            BuildJob.fetch(
                self.job_id(name), connection=self._client, serializer=JSONSerializer
            ).cancel()

    def remove(self, name: str) -> None:
        """Removes a job, so that the servers that wait for it enqueue it again."""
        with contextlib.suppress(NoSuchJobError, InvalidJobOperation, ValueError):
            BuildJob.fetch(
                self.job_id(name), connection=self._client, serializer=JSONSerializer
            ).delete()

    def load(self) -> Load:
        """Returns the present load. Jobs in workers' own queues count as those of devices.

        Writes, too: a Redis that can only be read is of no use.
        """
        self._client.set(self._key("frontend"), "1", ex=60)
        alive, others = self._alive()
        with self._client.pipeline(transaction=False) as pipeline:
            for queue in (self.prepared, self.devices, *(self.own(name) for name, _ in alive)):
                pipeline.llen(queue.key)
            prepared, *devices = pipeline.execute()
        slots = sum(slots for _, slots in alive)
        return Load(sum(devices), prepared, slots, len(alive), others)

    def _alive(self) -> tuple[list[tuple[str, int]], int]:
        """Returns names and slots of live workers, and how many have another version."""
        found = self._client.eval(_WORKERS, 1, self._key("workers"), str(WORKER_SECONDS))
        members = found if isinstance(found, list) else []
        alive = []
        for member in members:
            name, _, rest = member.decode("ascii", "replace").partition(" ")
            slots, _, version = rest.partition(" ")
            if version == self.version and slots.isdigit() and len(slots) < 5:
                alive.append((name, int(slots)))
        return alive, len(members) - len(alive)

    # -- workers

    def pass_on(self, job_id: str, queue: str) -> None:
        """Returns a job that was taken from ``queue``, as the last one for all workers."""
        target = self.prepared if queue == self.prepared.name else self.devices
        self._client.eval(_RETURN, 2, target.key, f"rq:job:{job_id}", job_id, target.name)

    def report_alive(self, worker: str, slots: int) -> None:
        """Records a worker's sign of life."""
        values = (worker, slots, self.version, str(WORKER_SECONDS))
        self._client.eval(_ALIVE, 1, self._key("workers"), *values)

    def report_gone(self, worker: str, slots: int) -> None:
        """Forgets a worker that stops."""
        self._client.zrem(self._key("workers"), f"{worker} {slots} {self.version}")

    def try_report_base(self, base: str, worker: str) -> None:
        """Records that a worker has a base's index. Does nothing if Redis cannot be reached: builds
        only take longer then.
        """
        with contextlib.suppress(redis.RedisError):
            self._client.set(self._key(f"base:{base}"), worker, ex=BASE_SECONDS)
