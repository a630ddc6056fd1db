"""Waits for events that happen once, or many times."""

from __future__ import annotations

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from obdelta.concurrency.tasks import Event, Waiters


def test_an_event_ends_all_waits_that_have_begun() -> None:
    waiters: Waiters[int] = Waiters()
    first, second = waiters.wait(), waiters.wait()
    again: list[int] = []
    first.addCallback(lambda _: waiters.wait().addCallback(again.append))
    waiters.fire(1)
    assert second.result == 1 and again == [] and len(waiters) == 1
    waiters.fire(2)
    assert again == [2] and len(waiters) == 0


def test_a_cancelled_wait_does_not_end_the_others() -> None:
    waiters: Waiters[int] = Waiters()
    first, second, third = waiters.wait(), waiters.wait(), waiters.wait()
    ended: list[object] = []
    for cancelled in (first, third):
        cancelled.addErrback(lambda failure: ended.append(failure.type))
    first.cancel()
    second.addCallback(lambda _: third.cancel())
    waiters.fire(7)
    assert second.called and ended == [CancelledError, CancelledError]


def test_an_error_reaches_every_wait() -> None:
    waiters: Waiters[int] = Waiters()
    waits = [waiters.wait() for _ in range(2)]
    waiters.fire(Failure(KeyError("no")))
    types: list[object] = []
    for wait in waits:
        wait.addErrback(lambda failure: types.append(failure.type))
    assert types == [KeyError, KeyError]


def test_after_an_event_new_waits_end_at_once() -> None:
    event = Event()
    before = event.wait()
    assert event.waiting == 1 and [before.called, event.happened] == [False, False]
    event.fire()
    event.fire()
    after = event.wait()
    assert [before.called, after.called, event.happened] == [True, True, True]
    assert not event.waiting
