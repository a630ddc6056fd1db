"""The status of a server with hostile names, for its pages."""

from __future__ import annotations

from dataclasses import replace

from obdelta.builds.device_estimates import DeviceEstimate, FleetEstimate
from obdelta.oci import Digest, Form
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, FailureRow, Outcome, Totals
from obdelta.store.catalogue.tables.counters import Served
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.request_traces import RequestTrace

HOSTILE = "v2/<script>alert(1)</script>\"'&\x00\x1b\u202e\udcff\n\u0000</bdi>"


def a_row(**details: object) -> DeltaRow:
    return DeltaRow(
        DeltaKey("v3", 1, Digest("a" * 64), Digest("b" * 64)),
        HOSTILE,
        HOSTILE + "2",
        "delta-0123456789abcdef",
        Digest("c" * 64),
        1_000_000,
        50_000,
        2.5,
        1000,
        details=details,
    )


def a_failure(outcome: Outcome, reason: str) -> FailureRow:
    return FailureRow(
        "v3", Digest("a" * 64), Digest("b" * 64), outcome, reason, 3, 900, HOSTILE, HOSTILE
    )


def a_refusal() -> RequestTrace:
    return RequestTrace(
        when=900.0,
        request="0123456789abcdef",
        peer="192.0.2.7",
        subject=HOSTILE,
        token=True,
        method="GET",
        path="/v2/",
        image=HOSTILE,
        status=403,
        bytes=0,
        seconds=0.1,
        end="done",
        reason=HOSTILE,
    )


def known(**changed: object) -> StatusData:
    value = StatusData(
        now=5000.0,
        clock=5000.0,
        devices=3,
        totals=Totals(1, 2, 60_000),
        counters={
            "served.v3.full_bytes": 10_000_000,
            "served.v3.delta_bytes": 500_000,
            "served.v3.deltas": 10,
        },
        served=[Served(0, 10, 10_000_000, 500_000)],
        served_daily=[Served(0, 10, 10_000_000, 500_000)],
        recent=[a_row()],
        failures=[a_failure(Outcome.ERROR, f"upstream registry: {HOSTILE}")],
        store={"deltas": 60_000, "layers": 1_000_000, "trees": 0},
        quota=2_000_000,
        problems={"upstream": HOSTILE, "store": None},
        fleets=[FleetEstimate(HOSTILE, Form.ZSTD, DeviceEstimate(1_800_000, 210, 34))],
    )
    return replace(value, **changed)  # type: ignore[arg-type] # whatever a test names
