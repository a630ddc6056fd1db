"""Leases in Redis that expire by themselves, and the recorded results of the work they cover.

A lease is a key with its holder's token and a time to live, renewed while the work goes on. A
holder that dies, or is cut off, has lost it after that time, and the next replica takes it. Each
lease has a number, larger than those before it (a fencing token: "How to do distributed locking",
Kleppmann 2016), which is stored with the result. The result of a holder that was overtaken is
refused. Every step is one Lua script, which Redis runs as a whole.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from obdelta.builds.replicas.redis_connection import Connection
from obdelta.concurrency.tasks import Waiters
from obdelta.errors import SharedUnavailable

log = Logger()

LEASE_SECONDS = 20.0
"""Seconds without a sign of life after which another replica takes over a build. Three renewals
in a row may be lost before.
"""
MAX_LEASE = 60.0
"""Longest time to live in seconds of a credible lease; earlier versions use up to 30."""
MAX_RESULT = 8 * 86400.0
"""Longest time to live in seconds of a credible result; replicas use 7 days at most."""
MAX_TEXT = 16 * 1024
"""Bytes of a result's text; replicas write less than 2,000."""
MAX_ATTEMPTS = 3
"""How often an invalid result is removed before the replica goes on by itself."""

# The contents of keys are checked here, before any of it leaves Redis: other programs may write to
# the same server. Values that no replica can have written count as absent, and are replaced:
# another type, no or too long a time to live, too long a text.
_CHECKED = f"""
local function alive(key, kind, most)
  local left = redis.call('PTTL', key)
  if left <= 0 or left > most then return nil end
  if redis.call('TYPE', key)['ok'] ~= kind then return nil end
  return left
end
local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local function number(text)
  local found = #text <= 20 and tonumber(text)
  if found and found >= 0 and found < now() + 86400000000 then return found end
  return nil
end
local function holder(key)
  if not alive(key, 'string', {MAX_LEASE * 1000:.0f}) or redis.call('STRLEN', key) > 64 \
then return nil end
  return redis.call('GET', key)
end
local function result(key)
  local left = alive(key, 'hash', {MAX_RESULT * 1000:.0f})
  if left and redis.call('HSTRLEN', key, 'text') <= {MAX_TEXT} \
and redis.call('HSTRLEN', key, 'number') <= 20 then
    local found = number(redis.call('HGET', key, 'number') or '')
    local text = redis.call('HGET', key, 'text')
    if found and text then return {{text = text, number = found, left = left}} end
  end
  redis.call('DEL', key)
  return nil
end
local function last(key)
  if redis.call('TYPE', key)['ok'] ~= 'string' or redis.call('STRLEN', key) > 20 then return 0 end
  return number(redis.call('GET', key)) or 0
end
"""
# KEYS: lease, result, last number. ARGV: token, milliseconds.
_TAKE = f"""{_CHECKED}
local done = result(KEYS[2])
if done then return {{'done', done.text, done.left}} end
local held = holder(KEYS[1])
if held and held ~= ARGV[1] then return {{'held'}} end
local next = string.format('%.0f', math.max(now(), last(KEYS[3]) + 1))
redis.call('SET', KEYS[3], next)
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {{'taken', next}}
"""
# KEYS: lease, result. ARGV: token, milliseconds, number. A lease that Redis forgot is taken again
# if no other replica had it and the work is not finished.
_RENEW = f"""{_CHECKED}
local held = holder(KEYS[1])
if held and held ~= ARGV[1] then return 0 end
local done = result(KEYS[2])
if done and done.number >= tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# KEYS: lease. ARGV: token.
_RELEASE = f"""{_CHECKED}
if holder(KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
# KEYS: lease, result. ARGV: token, number, text, milliseconds that the result stays.
_FINISH = f"""{_CHECKED}
local held = holder(KEYS[1])
if held and held ~= ARGV[1] then return 0 end
local done = result(KEYS[2])
if done and done.number > tonumber(ARGV[2]) then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'number', ARGV[2], 'text', ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
if held then redis.call('DEL', KEYS[1]) end
return 1
"""
# KEYS: result. ARGV: its text as it is known.
_FORGET = f"""{_CHECKED}
local done = result(KEYS[1])
if done and done.text == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_HELD = f"""{_CHECKED}
local found = {{}}
for place, key in ipairs(KEYS) do found[place] = holder(key) and 1 or 0 end
return found
"""
WATCH_EVERY = 1.0
"""Seconds between two checks of other replicas' leases that builds here wait for: one query for
all.
"""


@dataclass(slots=True, eq=False)
class Lease:
    """A lease. ``number`` grows from one lease to the next.

    ``lost``: another replica has, or may have, the work by now.
    """

    name: str
    token: str
    number: int
    until: float
    lost: bool = False


class Held(Exception):
    """Another replica does the work."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result of the work, as it was passed to :meth:`Leases.finish`, if a replica wrote it.

    ``seconds``: the key's remaining time to live.
    """

    text: bytes
    seconds: float


def prefix_of(registry: str) -> str:
    """Returns the prefix of all Redis keys. Only replicas of the same registry share them."""
    return f"obdelta:{hashlib.sha256(registry.encode('utf-8')).hexdigest()[:16]}:"


class Leases:
    """Leases in Redis, one for each piece of work; all keys begin with ``prefix``. ``seconds``: how
    long a holder may be silent.

    The taker of a lease ends it with :meth:`finish` or :meth:`release`; until then it is renewed.
    All methods raise SharedUnavailable.
    """

    def __init__(
        self, connection: Connection, prefix: str, seconds: float, clock: IReactorTime
    ) -> None:
        self._connection, self._prefix, self._seconds, self._clock = (
            connection,
            prefix,
            seconds,
            clock,
        )
        self._held: set[Lease] = set()
        self._watched: dict[str, Waiters[None]] = {}
        self._unknown_since: float | None = None
        self._renewing = self._every(seconds / 4, self._renew)
        self._watching = self._every(WATCH_EVERY, self._watch)

    def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> LoopingCall:
        call = LoopingCall(lambda: ensureDeferred(work()))  # type: ignore[arg-type] # they are coroutines
        call.clock = self._clock
        call.start(seconds, now=False)
        return call

    def _keys(self, name: str) -> tuple[str, str]:
        return f"{self._prefix}lease:{name}", f"{self._prefix}result:{name}"

    @property
    def _milliseconds(self) -> int:
        return int(self._seconds * 1000)

    async def take(self, name: str) -> Lease | Done:
        """Returns the lease, or the recorded result of the work. Raises Held."""
        token = secrets.token_hex(16)
        began = self._clock.seconds()
        found = await self._connection.script(
            _TAKE, [*self._keys(name), f"{self._prefix}number"], [token, self._milliseconds]
        )
        match found:
            case [b"held"]:
                raise Held
            case [b"done", bytes(text), int(left)]:
                return Done(text, left / 1000)
            case [b"taken", bytes(number)] if number.isdigit() and len(number) <= 20:
                lease = Lease(name, token, int(number), began + self._seconds)
                self._held.add(lease)
                return lease
        raise SharedUnavailable("it sends a result that no script of obdelta returns")

    async def _renew(self) -> None:
        for lease in list(self._held):
            began = self._clock.seconds()
            try:
                is_held = await self._connection.script(
                    _RENEW, self._keys(lease.name), [lease.token, self._milliseconds, lease.number]
                )
            except SharedUnavailable:
                is_held = None
            if is_held and lease in self._held:
                lease.until, lease.lost = began + self._seconds, False
            elif is_held:
                await self._release(lease)  # it was released while it was being renewed
            elif is_held is not None or self._clock.seconds() > lease.until:
                self._mark_lost(lease)

    def _mark_lost(self, lease: Lease) -> None:
        if lease in self._held and not lease.lost:
            lease.lost = True
            log.warn(
                "the lease on {name} is lost: another replica may build the same", name=lease.name
            )

    async def release(self, lease: Lease) -> None:
        """Releases the lease. Never raises: without Redis, the lease ends by itself."""
        if lease in self._held:
            self._held.discard(lease)
            await self._release(lease)

    async def _release(self, lease: Lease) -> None:
        try:
            await self._connection.script(_RELEASE, self._keys(lease.name)[:1], [lease.token])
        except SharedUnavailable as error:
            log.debug(
                "the lease on {name} was not released: {reason}", name=lease.name, reason=str(error)
            )

    async def finish(self, lease: Lease, text: str, seconds: float) -> bool:
        """Records the result of the work for ``seconds``, and releases the lease.

        Returns False, without recording, if the lease was overtaken.
        """
        recorded = await self._connection.script(
            _FINISH, self._keys(lease.name), [lease.token, lease.number, text, int(seconds * 1000)]
        )
        self._held.discard(lease)
        if not recorded:
            await self._release(lease)
        return bool(recorded)

    async def forget(self, name: str, done: Done) -> None:
        """Removes a result that is no longer valid; a newer one stays."""
        await self._connection.script(_FORGET, self._keys(name)[1:], [done.text])

    async def wait_until_free(self, name: str, seconds: float) -> None:
        """Waits until the lease is free, for ``seconds`` at most.

        While Redis is unavailable for as long as a lease lasts, the lease counts as free.
        """
        waiters = self._watched.setdefault(name, Waiters())
        try:
            await waiters.wait().addTimeout(
                seconds, self._clock, onTimeoutCancel=lambda _result, _seconds: None
            )
        finally:
            if not waiters and self._watched.get(name) is waiters:
                del self._watched[name]

    async def _watch(self) -> None:
        names = list(self._watched)
        if not names:
            self._unknown_since = None
            return
        try:
            held = await self._connection.script(_HELD, [self._keys(name)[0] for name in names], [])
        except SharedUnavailable:
            now = self._clock.seconds()
            self._unknown_since = now if self._unknown_since is None else self._unknown_since
            if now - self._unknown_since >= self._seconds:
                self._fire(names)
            return
        self._unknown_since = None
        if isinstance(held, list) and len(held) == len(names):
            self._fire(name for name, count in zip(names, held, strict=True) if not count)

    def _fire(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._watched:
                self._watched.pop(name).fire(None)

    async def close(self) -> None:
        """Releases all leases."""
        for call in (self._renewing, self._watching):
            if call.running:
                call.stop()
        for lease in list(self._held):
            await self.release(lease)
