"""The file writer against a model: any order of writes, reads, pauses, departures, failures and
thread switches.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IConsumer, IProducer, IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.errors import Cancelled, DigestMismatch, ObdeltaError, SizeMismatch
from obdelta.oci import Digest
from obdelta.store import files
from obdelta.store.file_writer import FileWriter
from tests.support.store import QueuedThreads


@implementer(IConsumer)
class Device:
    """A consumer that keeps its bytes, and checks the producer's calls."""

    def __init__(self, start: int, stop: int | None, pause_each: bool) -> None:
        self.start, self.stop, self.pause_each = start, stop, pause_each
        self.received = bytearray()
        self.producer: IPushProducer | None = None
        self.registrations = 0
        self.paused = False
        self.left = False
        self.outcome: Failure | str | None = None

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        assert streaming
        assert IPushProducer.providedBy(producer)
        assert self.producer is None
        self.producer = producer
        self.registrations += 1

    def unregisterProducer(self) -> None:
        assert self.producer is not None
        self.producer = None

    def write(self, data: bytes) -> None:
        assert self.producer is not None
        assert not self.paused
        assert data
        self.received += data
        if self.pause_each:
            self.pause()

    def pause(self) -> None:
        assert self.producer is not None
        self.paused = True
        self.producer.pauseProducing()

    def resume(self) -> None:
        assert self.producer is not None
        self.paused = False
        self.producer.resumeProducing()

    def watch(self, delivery: Deferred[None]) -> None:
        delivery.addCallbacks(self._succeeded, self._failed)

    def _succeeded(self, _: None) -> None:
        assert self.outcome is None
        self.outcome = "whole"

    def _failed(self, failure: Failure) -> None:
        assert self.outcome is None
        self.outcome = failure


class FileWriterModel(RuleBasedStateMachine):
    """The promises of a file writer, whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="obdelta-spool-"))
        self.final = self.directory / "final"
        self.threads = QueuedThreads()
        self.devices: list[Device] = []
        self.content = b""  # what was handed to write
        self.calls: list[Deferred[object]] = []
        self.outcomes: list[object] = []
        self.given_up = False
        self.end_requested = False
        self.wrong_end = False
        self.descriptors = set(Path("/proc/self/fd").iterdir())

    @initialize(
        length=st.none() | st.integers(0, 300_000),
        unverified_tail=st.sampled_from([0, 0, 1, 1000, 70_000]),
        at_once=st.booleans(),
        order=st.integers(0, 2**32),
    )
    def begin(self, length: int | None, unverified_tail: int, at_once: bool, order: int) -> None:
        self.order = random.Random(order)

        def publish(tmp: Path, digest: Digest, size: int) -> Path:
            assert tmp.stat().st_size == size
            files.move_into_place(tmp, self.final)
            return self.final

        self.length, self.unverified_tail = length, unverified_tail
        self.tmp = self.directory / "tmp"
        self.writer = FileWriter(
            self.tmp, self.threads, publish, length=length, unverified_tail=unverified_tail
        )
        assert self.writer._own is not None
        self.writer._own._at_once = at_once  # False: as on file systems that cannot

    def _busy(self) -> bool:
        return any(not call.called for call in self.calls)

    def _over(self) -> bool:
        return self.writer.complete or self.writer.failure is not None

    @precondition(lambda self: not self._busy() and not self.end_requested and not self._over())
    @rule(
        size=st.integers(0, 200_000) | st.integers(0, 10),
        seed=st.integers(0, 255),
        cancel=st.booleans(),
    )
    def write(self, size: int, seed: int, cancel: bool) -> None:
        chunk = bytes([seed]) * size
        if self.length is not None and len(self.content) + size > self.length:
            self.wrong_end = True
        else:
            self.content += chunk
        self._call(ensureDeferred(self.writer.write(chunk)))
        if cancel and size % 7 == 0:
            self._give_up()

    @precondition(lambda self: not self._busy() and not self.end_requested and not self._over())
    @rule(good=st.booleans())
    def finish(self, good: bool) -> None:
        self.end_requested = True
        digest = Digest.of(self.content if good else self.content + b"?")
        if not good or (self.length is not None and self.length != len(self.content)):
            self.wrong_end = True
        self._call(ensureDeferred(self.writer.finish(digest, len(self.content))))

    @precondition(lambda self: not self.given_up)
    @rule(sure=st.integers(0, 9))
    def abort(self, sure: int) -> None:
        if sure == 0:
            self._give_up()

    def _give_up(self) -> None:
        # Like a writer that is cancelled: its wait ends, its call may still run, and it aborts.
        for call in self.calls:
            call.cancel()
        self.given_up = self.end_requested = True
        self._call(ensureDeferred(self.writer.abort()))

    def _call(self, call: Deferred[object]) -> None:
        self.calls.append(call)
        call.addBoth(self.outcomes.append)

    @rule(
        start=st.integers(0, 250_000) | st.integers(0, 10),
        length=st.none() | st.integers(0, 200_000),
        pause=st.booleans(),
    )
    def a_device_connects(self, start: int, length: int | None, pause: bool) -> None:
        self._device(start, None if length is None else start + length, pause)

    @precondition(lambda self: self.length is not None)
    @rule(before_end=st.integers(0, 100_000), pause=st.booleans())
    def device_wants_all_the_rest(self, before_end: int, pause: bool) -> None:
        assert self.length is not None
        self._device(max(0, self.length - before_end), self.length, pause)

    def _device(self, start: int, stop: int | None, pause: bool) -> None:
        device = Device(start, stop, pause)
        self.devices.append(device)
        device.watch(self.writer.deliver(device, device.start, device.stop))
        assert device.registrations == 1

    def _present(self) -> list[Device]:
        return [device for device in self.devices if device.producer is not None]

    @precondition(lambda self: self._present())
    @rule(
        index=st.integers(0, 100),
        what=st.sampled_from(["pause", "resume", "resume", "resume", "leave", "leave twice"]),
    )
    def device_acts(self, index: int, what: str) -> None:
        present = self._present()
        device = present[index % len(present)]
        producer = device.producer
        assert producer is not None
        if what == "pause":
            device.pause()
        elif what == "resume":
            device.resume()
        else:
            device.left = True
            producer.stopProducing()
            if what == "leave twice":
                producer.stopProducing()
                producer.resumeProducing()
            assert isinstance(device.outcome, Failure)
            assert device.outcome.check(CancelledError)

    @precondition(lambda self: self.threads.calls)
    @rule(index=st.integers(0, 100))
    def a_thread_runs(self, index: int) -> None:
        self.threads.run_call(index)

    @precondition(lambda self: self.threads.turns)
    @rule()
    def the_reactor_turns(self) -> None:
        self.threads.run_turn()

    @invariant()
    def no_device_gets_wrong_or_early_bytes(self) -> None:
        for device in self.devices:
            end = device.start + len(device.received)
            assert device.received == self.content[device.start : end]
            if device.received and not self.writer.complete:
                total = self.writer.size if self.length is None else self.length
                assert end <= max(0, total - self.unverified_tail)
            if device.outcome == "whole":
                assert device.received == self.content[device.start : device.stop]
                assert (
                    len(device.received)
                    == (len(self.content) if device.stop is None else device.stop) - device.start
                )
                if device.stop is None or device.stop == self.length:
                    assert self.writer.complete

    @invariant()
    def ended_is_unregistered(self) -> None:
        assert [device.producer is None for device in self.devices] == [
            device.outcome is not None for device in self.devices
        ]
        assert self.writer.readers == len(self._present())

    @invariant()
    def only_good_files_get_their_place(self) -> None:
        if self.final.exists():
            assert not self.wrong_end
            assert self.final.read_bytes() == self.content

    def teardown(self) -> None:
        try:
            if hasattr(self, "spool"):
                self._end()
        finally:
            shutil.rmtree(self.directory)

    def _end(self) -> None:
        if not self.end_requested and not self._over():
            if self._busy():
                self._give_up()
            else:
                self.finish(good=True)
        for _ in range(self.order.randrange(3)):
            self.threads.run_turn()
        for device in self._present():
            device.pause_each = False
            device.resume()
            if device.producer is not None and self.order.randrange(3) == 0:
                device.left = True
                device.producer.stopProducing()
        self.threads.drain(self.order)
        assert self._over()
        assert not self.tmp.exists()
        for device in self.devices:
            assert device.outcome is not None
            if isinstance(device.outcome, Failure) and not device.left:
                error = device.outcome.value
                assert isinstance(error, ObdeltaError)
                if self.writer.complete:
                    assert isinstance(error, SizeMismatch)
                    assert max(device.start, device.stop or 0) > len(self.content)
                else:
                    assert isinstance(error, DigestMismatch | SizeMismatch | Cancelled)
        if self.writer.complete:
            assert (
                hashlib.sha256(self.final.read_bytes()).digest()
                == hashlib.sha256(self.content).digest()
            )
            self._late_device()
        else:
            assert not self.final.exists()
            assert self.given_up or self.wrong_end
        self.threads.drain(self.order)
        self.no_device_gets_wrong_or_early_bytes()
        assert set(Path("/proc/self/fd").iterdir()) == self.descriptors

    def _late_device(self) -> None:
        late = Device(0, None, False)
        late.watch(self.writer.deliver(late))
        self.threads.drain(self.order)
        assert late.outcome == "whole"
        assert late.received == self.content


def test_the_writer_behaves_as_its_model() -> None:
    run_state_machine_as_test(
        FileWriterModel, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
