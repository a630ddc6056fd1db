"""Deltas served per hour, with the bytes saved. Everything here runs in the database's thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from obdelta.oci import Digest

HOUR = 3600
KEPT_HOURS = 24 * 400
"""Rows are deleted after a year and a month."""
_UPSERT = """
    INSERT INTO hours VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        deltas = deltas + excluded.deltas,
        full_bytes = full_bytes + excluded.full_bytes,
        delta_bytes = delta_bytes + excluded.delta_bytes"""


@dataclass(frozen=True, slots=True)
class Served:
    """Totals served from the time ``start`` on (seconds UTC). ``full_bytes``: the bytes of full
    pulls instead.
    """

    start: int
    deltas: int
    full_bytes: int
    delta_bytes: int


def note(
    connection: sqlite3.Connection, served: Iterable[tuple[Digest, int, int]]
) -> dict[str, int]:
    """Records contents, how often each was served, and when last. Returns the increments of
    counters.
    """
    counters: dict[str, int] = {}
    for content, count, now in served:
        found = connection.execute(
            "SELECT kind, form, full_bytes, delta_bytes FROM deltas WHERE content = ? LIMIT 1",
            (content.hex,),
        ).fetchone()
        if found is None:
            continue
        kind, form, full, delta = found
        connection.execute(_UPSERT, (now // HOUR, kind, count, count * full, count * delta))
        raised = {
            f"served.{kind}.deltas": count,
            f"served.{kind}.full_bytes": count * full,
            f"served.{kind}.delta_bytes": count * delta,
        }
        if kind == "v3":
            raised[f"form.{form}"] = count
        for name, amount in raised.items():
            counters[name] = counters.get(name, 0) + amount
    return counters


def read(connection: sqlite3.Connection, since: int, step: int) -> list[Served]:
    """Returns totals in steps of a number of hours, without empty steps. ``since`` in seconds."""
    rows = connection.execute(
        "SELECT hour / ?1 * ?1 AS step, sum(deltas), sum(full_bytes), sum(delta_bytes) FROM hours"
        " WHERE hour >= ?2 GROUP BY step ORDER BY step",
        (step, since // HOUR),
    )
    return [Served(hour * HOUR, deltas, full, delta) for hour, deltas, full, delta in rows]
