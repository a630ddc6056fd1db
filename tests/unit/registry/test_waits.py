"""Waits between attempts at the upstream."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from obdelta.errors import TooManyRequests, UpstreamUnavailable
from obdelta.registry.http.transport_errors import TransientUpstreamError
from obdelta.registry.requests import Backoff, Retrier
from tests.support.clients import started


def attempts(
    backoff: Backoff, error: Exception, seconds: float, takes: float = 0.0
) -> tuple[list[float], Exception]:
    """Returns when the attempts began within ``seconds`` seconds, each taking some time, and the
    result.
    """
    clock, began = Clock(), list[float]()

    async def attempt() -> None:
        began.append(clock.seconds())
        if takes:
            done: Deferred[None] = Deferred()
            clock.callLater(takes, done.callback, None)
            await done
        raise error

    _, errors, _ = started(Retrier(backoff, clock, lambda: 1.0).call(attempt))
    clock.pump([0.125] * int(seconds * 8))
    assert isinstance(errors[0], Exception)
    return began, errors[0]


def test_the_waits_double_up_to_a_bound() -> None:
    trouble = TransientUpstreamError("x")
    began, error = attempts(Backoff(attempts=6, first=0.5, most=3.0), trouble, 60)
    assert (began, error) == ([0.0, 0.5, 1.5, 3.5, 6.5, 9.5], trouble)


def test_jitter_shortens_waits_by_up_to_a_half() -> None:
    clock, began = Clock(), list[float]()

    async def attempt() -> None:
        began.append(clock.seconds())
        raise TransientUpstreamError("x")

    _, errors, _ = started(
        Retrier(Backoff(attempts=3, first=1.0), clock, lambda: 0.0).call(attempt)
    )
    clock.pump([0.25] * 100)
    assert began == [0.0, 0.5, 1.5] and len(errors) == 1


def test_retry_after_is_obeyed_within_bounds() -> None:
    backoff = Backoff(attempts=3, first=0.5, max_retry_after=30.0)
    assert attempts(backoff, TooManyRequests("x", 20.0), 60)[0] == [0.0, 20.0, 40.0]
    assert attempts(backoff, TooManyRequests("x", 31.0), 60)[0] == [0.0]
    assert attempts(backoff, TooManyRequests("x"), 60)[0] == [0.0, 0.5, 1.5]


def test_slow_failures_are_retried_for_a_limited_time() -> None:
    began, _ = attempts(
        Backoff(attempts=5, first=0.5, time_limit=90.0),
        TransientUpstreamError("x"),
        300,
        takes=60.0,
    )
    assert began == [0.0, 60.5]


def test_other_errors_are_not_retried() -> None:
    assert attempts(Backoff(), UpstreamUnavailable("x"), 10)[0] == [0.0]


def test_a_wait_can_be_cancelled() -> None:
    clock = Clock()

    async def attempt() -> None:
        raise TransientUpstreamError("x")

    _, errors, running = started(Retrier(Backoff(), clock).call(attempt))
    running.cancel()
    assert [type(error) for error in errors] == [CancelledError] and clock.getDelayedCalls() == []
