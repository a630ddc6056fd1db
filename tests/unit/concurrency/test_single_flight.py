"""Tasks shared by waiters: cancelled waits, and waits for the end."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred

from obdelta.concurrency.tasks import SingleFlight, Task


def test_a_cancelled_wait_does_not_cancel_the_task() -> None:
    work: Deferred[int] = Deferred()

    async def run() -> int:
        return await work

    task = Task(run())
    first = ensureDeferred(task.result())
    second = ensureDeferred(task.result())
    first.cancel()
    first.addErrback(lambda failure: failure.trap(CancelledError))
    work.callback(7)
    assert second.result == 7
    assert ensureDeferred(task.result()).result == 7


def test_all_waiters_get_its_error() -> None:
    async def run() -> int:
        raise KeyError("no")

    task = Task(run())
    for _ in range(2):
        failed = ensureDeferred(task.result())
        failed.addErrback(lambda failure: failure.type)
        assert failed.result is KeyError


def test_stopping_waits_until_the_task_is_cancelled() -> None:
    work: Deferred[None] = Deferred()
    tidied: Deferred[None] = Deferred()

    async def run() -> None:
        try:
            await work
        finally:
            await tidied

    async def use() -> None:
        task = Task(run())
        try:
            await task.result()
        finally:
            await task.end()

    using = ensureDeferred(use())
    using.cancel()
    outcome: list[object] = []
    using.addBoth(outcome.append)
    assert outcome == []
    tidied.callback(None)
    assert len(outcome) == 1


class Work:
    """Work that the test ends, once for each start."""

    def __init__(self) -> None:
        self.begun: list[Deferred[int]] = []

    async def __call__(self) -> int:
        self.begun.append(Deferred())
        return await self.begun[-1]


def test_one_call_serves_all_waiters() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    waits = [ensureDeferred(flights.do("a", work)) for _ in range(3)]
    other = ensureDeferred(flights.do("b", work))
    assert len(work.begun) == 2
    work.begun[0].callback(7)
    assert [wait.result for wait in waits] == [7, 7, 7] and not other.called
    ensureDeferred(flights.do("a", work))
    assert len(work.begun) == 3


def test_work_is_cancelled_with_its_last_waiter() -> None:
    flights: SingleFlight[str, int] = SingleFlight()
    work = Work()
    waits = [ensureDeferred(flights.do("a", work)) for _ in range(2)]
    for wait in waits:
        wait.addErrback(lambda failure: failure.trap(CancelledError))
    cancelled: list[bool] = []
    for wait in waits:
        wait.cancel()
        cancelled.append(work.begun[0].called)
    assert cancelled == [False, True]
    later = ensureDeferred(flights.do("a", work))
    work.begun[1].callback(1)
    assert later.result == 1


def test_a_personal_error_does_not_reach_the_other_waiters() -> None:
    flights: SingleFlight[str, int] = SingleFlight(personal=(KeyError,))
    work = Work()
    first, second, third = (ensureDeferred(flights.do("a", work)) for _ in range(3))
    first.addErrback(lambda failure: failure.type)
    work.begun[0].errback(KeyError("mine"))
    assert first.result is KeyError and len(work.begun) == 2
    work.begun[1].callback(3)
    assert (second.result, third.result) == (3, 3)
