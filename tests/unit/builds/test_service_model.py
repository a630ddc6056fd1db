"""The service against a model: clients come and go, builds end in every way, time passes, the
process restarts.

The catalogue and the store are real. The upstream and the builder are doubles that do what the
model says.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest_twisted
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock

from obdelta.builds.queue import Priority
from obdelta.builds.types import Answer, FullPull, Ready
from obdelta.concurrency.limits import Limit
from obdelta.concurrency.tasks import Threads
from obdelta.errors import Cancelled, Denied, QueueFull, StillBuilding
from obdelta.registry import Credentials
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from tests.support.build_doubles import (
    CLIENT_LIMIT,
    ERRORS,
    IMAGES,
    MEMORY,
    ONCE_MORE,
    PAIRS,
    QUEUE_LIMIT,
    SLOTS,
    STARTS,
    Build,
    Builder,
    Client,
    pair_of,
)
from tests.support.build_service import FreeSpace, Registry, make_service, manifest_of
from tests.support.store import REACTOR, run_model
from tests.unit.store.test_quota_model import wait


class ServiceModel(RuleBasedStateMachine):
    """Checks the promises of the service."""

    threads: Threads

    def __init__(self) -> None:
        super().__init__()
        # Each step of a build is a synced write.
        fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="obdelta-builds-", dir=fast))
        self.clock = Clock()
        self.clock.advance(1_000_000)
        self.registry = Registry()
        self.registry.found |= {
            image.repository: manifest_of(image.repository) for image in IMAGES.values()
        }
        self.ready: set[str] = set()
        self.builds: dict[str, Build] = {}
        self.waiting: list[Client] = []
        self.verdicts: dict[str, float] = {}
        self.failures: dict[str, tuple[int, float]] = {}
        self.room = True
        self.catalogue: Catalogue | None = None

    @initialize()
    def begin(self) -> None:
        self.blobs = BlobStore(self.directory, self.threads)
        for pair in PAIRS:
            wait(self.blobs.put(pair.encode()))
        self.catalogue = wait(Catalogue.open(self.directory / "catalogue.sqlite", REACTOR))
        self._open()

    def _open(self) -> None:
        assert self.catalogue is not None

        async def make_room() -> bool:
            return self.room

        self.builder = Builder(self.blobs, self.catalogue)
        self.limit = Limit(CLIENT_LIMIT, "builds of one client")
        self.service = make_service(
            self.clock,
            self.catalogue,
            self.registry,
            self.builder,
            space=FreeSpace(make_room),
            max_builds=SLOTS,
            max_queue=QUEUE_LIMIT,
            limit=self.limit,
            build_seconds=10**9,
        )

    def _settle(self) -> None:
        """Runs until the catalogue's thread has nothing to do: it works in order, and no step
        takes so many turns.
        """
        assert self.catalogue is not None
        for _ in range(12):
            wait(self.catalogue.counters.all())

    # -- what may happen -----------------------------------------------------------------------

    @rule(
        pair=st.sampled_from(PAIRS),
        name=st.sampled_from("xyz"),
        seconds=st.sampled_from([5, 45, 2000]),
        priority=st.sampled_from(
            [Priority.DEVICE, Priority.DEVICE, Priority.PREPARED, Priority.UNPRIVILEGED]
        ),
    )
    def a_client_requests(self, pair: str, name: str, seconds: int, priority: Priority) -> None:
        async def ask() -> Deferred[Answer]:
            base, target = (IMAGES[letter] for letter in pair)
            return ensureDeferred(
                self.service.delta(
                    "v2", base, target, Credentials.bearer(name), seconds, name, priority=priority
                )
            )

        client = Client(name, pair, self.clock.seconds() + seconds, wait(ask()))
        client.request.addBoth(client.outcomes.append)
        self._settle()
        now = self.clock.seconds()
        count, last = self.failures.get(pair, (0, 0.0))
        if pair in self.builds:
            self.waiting.append(client)
        elif pair in self.ready:
            client.expect(Ready)
        elif pair in self.verdicts or (count >= 3 and last > now - MEMORY):
            client.expect(FullPull)
        else:
            self._begins(client)

    def _begins(self, client: Client) -> None:
        """Starts a build if there is room: a subject has its limit, and a full queue drops the
        newest build of the longest queue.

        The queue's own model says which one that is. Here it is at most one, it was queued, and
        its clients are notified.
        """
        own = sum(build.by == client.name for build in self.builds.values())
        running = {pair_of(build.pair) for build in self.service.running}
        evicted = self.builds.keys() - running
        assert len(evicted) + (client.pair not in running) <= 1
        if client.pair not in running:
            assert own >= CLIENT_LIMIT or self._is_full(len(self.builds))
            client.expect(QueueFull)
            return
        assert own < CLIENT_LIMIT
        for pair in evicted:
            assert self._is_full(len(self.builds))
            del self.builds[pair]
            for other in self._waiting_for(pair):
                other.expect(QueueFull)
        self.builds[client.pair] = Build(client.name)
        self.waiting.append(client)

    def _is_full(self, builds: int) -> bool:
        """Returns whether the queue may have been full, or one fleet's half of it."""
        return builds - len(self.builder.attempts) >= QUEUE_LIMIT // 2

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0, 100))
    def a_client_leaves(self, index: int) -> None:
        client = self.waiting.pop(index % len(self.waiting))

        async def leave() -> None:
            client.request.cancel()

        wait(leave())
        client.expect(CancelledError)

    @rule(seconds=st.sampled_from([1, 10, 50, 601]))
    def time_passes(self, seconds: int) -> None:
        async def advance() -> None:
            self.clock.advance(seconds)

        wait(advance())
        self._settle()
        over = [client for client in self.waiting if client.until <= self.clock.seconds()]
        for client in over:
            client.expect(StillBuilding)
            self.waiting.remove(client)

    @precondition(lambda self: self.builder.attempts)
    @rule(index=st.integers(0, 100))
    def a_build_is_done(self, index: int) -> None:
        pair = self._finish(index, None)
        del self.builds[pair]
        self.ready.add(pair)
        for client in self._waiting_for(pair):
            client.expect(Ready)

    @precondition(lambda self: self.builder.attempts)
    @rule(index=st.integers(0, 100), why=st.sampled_from(sorted(ERRORS)))
    def an_attempt_fails(self, index: int, why: str) -> None:
        pair = self._finish(index, ERRORS[why]())
        build = self.builds[pair]
        if why in ONCE_MORE and not build.low_memory and (why != "full" or self.room):
            build.low_memory = True
            return
        del self.builds[pair]
        notified = self._waiting_for(pair)
        now = self.clock.seconds()
        if why == "denied":
            self._denied(pair, build, notified)
            return
        if why in {"not worth", "unproven", "broken"}:
            self.verdicts[pair] = now
        else:
            count, last = self.failures.get(pair, (0, 0.0))
            times = 3 if why == "killed" else 1
            self.failures[pair] = ((count if last > now - MEMORY else 0) + times, now)
        full_pull = pair in self.verdicts or (why == "killed")
        for client in notified:
            if full_pull:
                client.expect(FullPull)
            else:
                client.expect(type(ERRORS[why]()) if why != "unexpected" else Exception)

    def _denied(self, pair: str, build: Build, notified: list[Client]) -> None:
        """Refused credentials are no verdict on the pair; a client with others retries with those,
        once.
        """
        for client in notified:
            if client.name == build.by or client.second:
                client.expect(Denied)
            elif pair in self.builds:
                client.second = True
                self.waiting.append(client)
            else:
                client.second = True
                self._begins(client)

    def _finish(self, index: int, error: Exception | None) -> str:
        attempts = sorted(self.builder.attempts)
        pair = attempts[index % len(attempts)]
        go, low_memory = self.builder.attempts[pair]
        assert low_memory == self.builds[pair].low_memory

        async def finish() -> None:
            if error is None:
                go.callback(None)
            else:
                go.errback(error)

        wait(finish())
        self._settle()
        return pair

    def _waiting_for(self, pair: str) -> list[Client]:
        notified = [client for client in self.waiting if client.pair == pair]
        self.waiting = [client for client in self.waiting if client.pair != pair]
        return notified

    @rule()
    def the_disk_is_full_or_not(self) -> None:
        self.room = not self.room

    @rule(drained=st.booleans())
    def the_process_restarts(self, drained: bool) -> None:
        """Restarts, in order or by a kill; queued and running builds continue, except those that
        two starts have resumed already.
        """
        if drained:
            draining: list[Deferred[None]] = []

            async def drain() -> None:
                draining.append(ensureDeferred(self.service.drain(30)))

            wait(drain())
            self._settle()
            assert {pair_of(build.pair) for build in self.service.running} == set(
                self.builder.attempts
            )
            assert draining[0].called == (not self.builder.attempts)

            async def time_is_up() -> None:
                self.clock.advance(30)

            wait(time_is_up())
            assert draining[0].called
        wait(self.service.close())
        for client in self.waiting:
            client.expect(Cancelled, StillBuilding)
        self.waiting.clear()
        assert not self.builder.attempts
        assert not self.limit.keys
        self._open()
        goes_on = {
            pair: build.starts + 1 for pair, build in self.builds.items() if build.starts < STARTS
        }
        assert wait(self.service.resume(Credentials.anonymous())) == len(goes_on)
        self._settle()
        self.builds = {pair: Build(None, starts=starts) for pair, starts in goes_on.items()}

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def in_step(self) -> None:
        if self.catalogue is None:
            return
        running = {pair_of(build.pair): build for build in self.service.running}
        assert running.keys() == self.builds.keys()
        idle = SLOTS - len(self.builder.attempts)
        if self.service._scheduler.queued and idle:
            queued = [build for build in running.values() if build.started is None]
            assert idle == 1 and {low.entry.owner.priority for low in queued if low.entry} == {
                Priority.UNPRIVILEGED
            }
        assert self.service._scheduler.queued == len(running) - len(self.builder.attempts)
        waits = Counter(client.pair for client in self.waiting)
        assert {pair: build.waiting for pair, build in running.items()} == {
            pair: waits[pair] for pair in running
        }
        assert all(not client.outcomes for client in self.waiting)
        for name in "xyz":
            assert self.limit.held(name) == sum(build.by == name for build in self.builds.values())

    def teardown(self) -> None:
        try:
            if self.catalogue is not None:
                self._end(self.catalogue)
        finally:
            shutil.rmtree(self.directory)

    def _end(self, catalogue: Catalogue) -> None:
        """After any history, everything can be ended cleanly."""
        for _ in range(len(self.builds)):
            self.a_build_is_done(0)
        assert not self.service.running
        assert not self.waiting
        assert wait(catalogue.pending_builds.take_all(STARTS))[0] == []
        wait(self.service.close())
        wait(catalogue.close())


@pytest_twisted.ensureDeferred
async def test_the_service_behaves_as_its_model() -> None:
    await run_model(ServiceModel, max_examples=25)
