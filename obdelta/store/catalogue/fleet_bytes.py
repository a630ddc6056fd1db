"""Bytes that each fleet's deltas take, so that no fleet fills the store alone.

Repositories connected by updates belong to one fleet: base and target of each publication.
Everything here runs in the database's thread, and reads every publication.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict

_DELTAS = """
    SELECT id, served > 0, last_served,
        CASE kind WHEN 'v2' THEN delta_bytes
        ELSE (SELECT coalesce(sum(size), 0) FROM layers_here WHERE manifest = content) END,
        last_served < ?1
    FROM deltas"""


def excess(connection: sqlite3.Connection, share: int, before: int) -> list[int]:
    """Returns ids of deltas by which fleets exceed their ``share`` of bytes each: unfetched first,
    then the least recently used.

    Only deltas built and last fetched ``before`` a time count. A delta that another fleet also has
    stays.
    """
    fleets = _fleets_of_deltas(connection)
    totals: dict[str, int] = defaultdict(int)
    removable: list[tuple[bool, int, int, int]] = []
    for number, fetched, last, size, may_go in connection.execute(_DELTAS, (before,)):
        owners = fleets.get(number, frozenset())
        for fleet in owners:
            totals[fleet] += size
        if may_go and size and len(owners) == 1:
            removable.append((bool(fetched), last, number, size))
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
    parent: dict[str, str] = {}

    def find(repository: str) -> str:
        root = repository
        while (above := parent.setdefault(root, root)) != root:
            root = above
        while parent[repository] != root:
            parent[repository], repository = root, parent[repository]
        return root

    rows = connection.execute(
        "SELECT delta, base_repository, target_repository FROM publications"
    ).fetchall()
    for _, base, target in rows:
        parent[find(base)] = find(target)
    fleets: dict[int, set[str]] = defaultdict(set)
    for delta, _, target in rows:
        fleets[delta].add(find(target))
    return {delta: frozenset(owners) for delta, owners in fleets.items()}
