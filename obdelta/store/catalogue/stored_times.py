"""Times in the catalogue: those ahead of the clock are corrected, and rows expire by their age.

Everything here runs in the database's thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Final

from obdelta.store.catalogue import failure_records
from obdelta.store.catalogue.tables import (
    counters,
    device_pulls,
    fleet_images,
    refreshed_rows,
)

HOUR: Final = 3600
MAX_AHEAD: Final = HOUR
"""Seconds by which a stored time may be ahead of the clock."""
EARLIEST: Final = 1_767_225_600
"""2026-01-01: a clock before this release is not set yet, and corrects nothing."""
TIMES: Final = (
    ("asked", "last"),
    ("deltas", "created"),
    ("deltas", "last_served"),
    ("device_downloads", "last"),
    ("failures", "last"),
    ("fleet_images", "last"),
    ("image_names", "last"),
    ("named_deltas", "last"),
    ("queued_builds", "since"),
    ("repository_failures", "last"),
    ("slow_work", "last"),
)
"""Table and column of every time that was read from the clock, in seconds UTC."""
HOURS: Final = ("hours", "hour")
"""The same in hours; it is part of the key, so rows are added up."""
ENDS: Final = (("started_pulls", "until"),)
"""Times that tokens state, not the clock: they are in the future by nature."""
SHARE: Final = 24
"""One pass of :func:`expire` deletes at most a table's rows divided by this number, plus one."""

_COLUMNS: Final = dict((*TIMES, HOURS, *ENDS))


def correct(connection: sqlite3.Connection, now: int) -> int:
    """Sets times that are more than an hour ahead of ``now`` to ``now``; returns how many.

    A clock that was ahead would otherwise keep failures until that date.
    """
    if now < EARLIEST:
        return 0
    count = 0
    for table, column in TIMES:
        count += connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {column} > ?",  # noqa: S608 - constants
            (now, now + MAX_AHEAD),
        ).rowcount
    ahead = (now + MAX_AHEAD) // HOUR
    connection.execute(
        "INSERT INTO hours SELECT ?, kind, sum(deltas), sum(full_bytes), sum(delta_bytes)"
        " FROM hours WHERE hour > ? GROUP BY kind ON CONFLICT DO UPDATE SET"
        " deltas = deltas + excluded.deltas, full_bytes = full_bytes + excluded.full_bytes,"
        " delta_bytes = delta_bytes + excluded.delta_bytes",
        (now // HOUR, ahead),
    )
    return count + connection.execute("DELETE FROM hours WHERE hour > ?", (ahead,)).rowcount


def expired_before(now: int, failure_memory: int) -> dict[str, int]:
    """Returns, for each table whose rows expire, the time up to which they are too old."""
    return {
        "asked": now - refreshed_rows.KEPT_SECONDS,
        "device_downloads": now - device_pulls.KEPT_SECONDS,
        "failures": now - failure_memory,
        "fleet_images": now - fleet_images.KEPT_SECONDS,
        "hours": now // counters.HOUR - counters.KEPT_HOURS,
        "image_names": now - refreshed_rows.KEPT_SECONDS,
        "named_deltas": now - refreshed_rows.KEPT_SECONDS,
        "repository_failures": now - failure_memory,
        "slow_work": now - failure_records.MEMORY_SECONDS,
        "started_pulls": now,
    }


def expire(connection: sqlite3.Connection, before: Mapping[str, int]) -> dict[str, int]:
    """Deletes the oldest rows up to a time, by table; returns how many of each.

    ``before`` is in the unit of the table's column. A clock that is wrong for long must not empty
    a table within hours, so one pass deletes a small part of it (:data:`SHARE`).
    """
    removed = {}
    for table, until in before.items():
        column = _COLUMNS[table]
        info = connection.execute(f"PRAGMA table_info({table})").fetchall()
        key = ", ".join(row[1] for row in info if row[5])
        removed[table] = connection.execute(
            f"DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table}"  # noqa: S608
            f" WHERE {column} <= ? ORDER BY {column}"
            f" LIMIT (SELECT 1 + count(*) / {SHARE} FROM {table}))",
            (until,),
        ).rowcount
    return removed
