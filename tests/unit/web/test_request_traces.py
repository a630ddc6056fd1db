"""Traces of requests stay within their bounds, and refusals find their clients."""

from __future__ import annotations

from typing import Any

import pytest

from obdelta.web.request_traces import (
    MAX_REFUSED,
    MAX_UNSENT,
    RequestTrace,
    RequestTraces,
    bounded,
)


def trace(number: int, status: int = 200, **more: Any) -> RequestTrace:
    return RequestTrace(
        **{
            "when": float(number),
            "request": f"r{number}",
            "peer": "192.0.2.1",
            "subject": "",
            "token": True,
            "method": "GET",
            "path": "/v2/",
            "image": "v2/a:latest",
            "status": status,
            "bytes": 0,
            "seconds": 0.0,
            "end": "done",
            "reason": "denied" if status == 403 else "",
            **more,
        }
    )


def test_many_good_requests_forget_no_refusal() -> None:
    traces = RequestTraces(lambda: 0.0, most=8)
    traces.add(trace(0, 403))
    for number in range(1, 100):
        traces.add(trace(number))
    assert [one.request for one in traces.find("192.0.2.1")] == [
        *(f"r{number}" for number in range(99, 91, -1)),
        "r0",
    ]


def test_the_number_of_clients_is_bounded_and_the_last_refused_stay() -> None:
    traces = RequestTraces(lambda: 0.0)
    for number in range(2 * MAX_REFUSED):
        traces.refused(trace(number, 403, subject=f"d_{number}"))
    clients = traces.refused_clients()
    assert len(clients) == MAX_REFUSED
    assert clients[0].last.subject == f"d_{2 * MAX_REFUSED - 1}"


def test_another_process_reports_requests_and_its_refusals_count_once() -> None:
    main, other = RequestTraces(lambda: 0.0), RequestTraces(lambda: 0.0)
    own = trace(1, 403, subject="d_1")
    other.refused(own)
    other.add(own)
    # A forwarded request: the main process refuses it, and the other one only sees its end.
    main.refused(trace(2, 403, subject="d_1"))
    other.add(trace(2, 403, subject="d_1", reason=""))
    main.absorb(other.unsent())
    assert other.unsent() == []
    assert [(one.request, one.reason) for one in main.find("1")] == [
        ("r2", "denied"),
        ("r1", "denied"),
    ]
    (client,) = main.refused_clients()
    assert client.count == 2


def test_a_busy_process_reports_the_last_of_its_requests() -> None:
    traces = RequestTraces(lambda: 0.0)
    for number in range(3 * MAX_UNSENT):
        traces.add(trace(number))
    assert [one["request"] for one in traces.unsent()][-1] == f"r{3 * MAX_UNSENT - 1}"


@pytest.mark.parametrize("wrong", [[{}], [1], [{"when": 1}]])
def test_a_malformed_trace_is_a_value_error(wrong: Any) -> None:
    with pytest.raises(ValueError, match="no traces"):
        RequestTraces(lambda: 0.0).absorb(wrong)


def test_untrusted_text_is_bounded_ascii() -> None:
    assert bounded("a\x1b\u202e" + "x" * 999)[:12] == "a\\x1b\\u202ex"
    assert len(bounded("\u202e" * 999)) == 300
