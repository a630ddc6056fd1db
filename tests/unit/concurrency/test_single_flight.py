"""A task that runs on its own: waits that are given up, and ends that are waited for."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred

from obdelta.concurrency.single_flight import Task


def test_who_stops_waiting_leaves_it_alone() -> None:
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


def test_its_error_is_told_to_all() -> None:
    async def run() -> int:
        raise KeyError("no")

    task = Task(run())
    for _ in range(2):
        failed = ensureDeferred(task.result())
        failed.addErrback(lambda failure: failure.type)
        assert failed.result is KeyError


def test_ending_waits_for_what_cancelling_takes() -> None:
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
