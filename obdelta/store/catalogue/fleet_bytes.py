"""Bytes that each fleet's deltas take, so that no fleet fills the store alone.

Fleets are learned from base and target of each publication, in the order of their builds.
Everything here runs in the database's thread, and reads every publication.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict

from obdelta.store.fleets import Fleets

FLEETS = 4
"""The quota is divided by this number: each fleet may always use one part for its deltas. With more
fleets the parts are smaller and equal.
"""
_DELTAS = """
    SELECT id, served > 0, last_served,
        CASE kind WHEN 'v2' THEN delta_bytes
        ELSE (SELECT coalesce(sum(size), 0) FROM layers_here WHERE manifest = content) END,
        pinned = 0 AND NOT created BETWEEN ?1 AND ?2
    FROM deltas"""


def excess(connection: sqlite3.Connection, share: int, before: int, latest: int) -> list[int]:
    """Returns ids of deltas by which fleets exceed their ``share`` of bytes each: unfetched first,
    then the least recently used.

    With :data:`FLEETS` fleets or more, the share is smaller: an equal part for each fleet and for
    one more. So a client with many fleets cannot fill the store either. Only deltas built
    ``before`` a time are chosen, and those built after ``latest``, when the clock was ahead.
    Fetches protect nothing here, since a client can repeat them for ever. A delta that another
    fleet also has stays, and so does a pinned one.
    """
    fleets = _fleets_of_deltas(connection)
    totals: dict[str, int] = defaultdict(int)
    removable: list[tuple[bool, int, int, int]] = []
    for number, fetched, last, size, may_go in connection.execute(_DELTAS, (before, latest)):
        owners = fleets.get(number, frozenset())
        for fleet in owners:
            totals[fleet] += size
        if may_go and size and len(owners) == 1:
            removable.append((bool(fetched), last, number, size))
    share = min(share, FLEETS * share // (len(totals) + 1))
    chosen = []
    for _, _, number, size in sorted(removable):
        (fleet,) = fleets[number]
        if totals[fleet] > share:
            totals[fleet] -= size
            chosen.append(number)
    return chosen


def _fleets_of_deltas(connection: sqlite3.Connection) -> dict[int, frozenset[str]]:
    """Returns the fleets that each delta is published for. A fleet is named after one of its
    repositories.
    """
    rows = connection.execute(
        "SELECT delta, base_repository, target_repository FROM publications"
        " ORDER BY delta, target_repository, base_repository"
    ).fetchall()
    learned = Fleets(limit=2 * len(rows))
    for _, base, target in rows:
        learned.of(base, target)
    fleets: dict[int, set[str]] = defaultdict(set)
    for delta, _, target in rows:
        fleets[delta].add(learned.fleet(target))
    return {delta: frozenset(owners) for delta, owners in fleets.items()}
