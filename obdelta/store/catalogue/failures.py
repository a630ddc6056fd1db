"""Failed builds: verdicts on contents by their digests, all other failures by the pair of
repositories.

Everything here runs in the database's thread.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from obdelta.oci import Digest
from obdelta.store.catalogue.records import FailureRow, Kind, Outcome

_VERDICTS = """
    SELECT kind, base, target, outcome, reason, count, last, base_repository, target_repository,
        recipe FROM failures """
_ERRORS = """
    SELECT kind, base, target, 'error', reason, count, last, base_repository, target_repository,
        recipe FROM repository_failures """
_OF_PAIR = "WHERE kind = ? AND base = ? AND target = ? AND last > ?"


def find(
    connection: sqlite3.Connection,
    kind: Kind,
    base: Digest,
    target: Digest,
    repositories: tuple[str, str],
    after: int,
) -> FailureRow | None:
    """Returns how a pair failed last, if later than ``after``: a verdict on its contents, else a
    failure of these repositories.
    """
    pair = (kind, base.hex, target.hex, after)
    row = connection.execute(_VERDICTS + _OF_PAIR, pair).fetchone()
    if row is None:
        rest = " AND base_repository = ? AND target_repository = ?"
        row = connection.execute(_ERRORS + _OF_PAIR + rest, (*pair, *repositories)).fetchone()
    return None if row is None else _row(row)


def remember(connection: sqlite3.Connection, failure: FailureRow, after: int) -> FailureRow:
    """Adds to the failures of the same kind that are later than ``after``; returns all of them as
    one row.
    """
    repositories = (failure.base_repository, failure.target_repository)
    found = find(connection, failure.kind, failure.base, failure.target, repositories, after)
    count = failure.count + (found.count if found is not None else 0)
    pair = (failure.kind, failure.base.hex, failure.target.hex)
    values = (failure.reason, count, failure.last, *repositories, failure.recipe)
    if failure.outcome is Outcome.ERROR:
        connection.execute(
            "INSERT OR REPLACE INTO repository_failures (kind, base, target, reason, count, last,"
            " base_repository, target_repository, recipe) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*pair, *values),
        )
    else:
        connection.execute(
            "DELETE FROM repository_failures WHERE kind = ? AND base = ? AND target = ? AND"
            " base_repository = ? AND target_repository = ?",
            (*pair, *repositories),
        )
        connection.execute(
            "INSERT OR REPLACE INTO failures (kind, base, target, outcome, reason, count, last,"
            " base_repository, target_repository, recipe) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*pair, failure.outcome.value, *values),
        )
    return FailureRow(
        failure.kind,
        failure.base,
        failure.target,
        failure.outcome,
        failure.reason,
        count,
        *values[2:],
    )


def later_than(connection: sqlite3.Connection, after: int) -> list[FailureRow]:
    """Returns all failures later than ``after``, latest first."""
    statement = (
        f"{_VERDICTS} WHERE last > ?1 UNION ALL {_ERRORS} WHERE last > ?1 ORDER BY last DESC"
    )
    return [_row(row) for row in connection.execute(statement, (after,))]


def forget(connection: sqlite3.Connection, kind: Kind, base: Digest, target: Digest) -> None:
    """Deletes the failures of a pair, in all repositories."""
    for table in ("failures", "repository_failures"):
        connection.execute(
            f"DELETE FROM {table} WHERE kind = ? AND base = ? AND target = ?",  # noqa: S608 - one of two constants
            (kind, base.hex, target.hex),
        )


def outdated(connection: sqlite3.Connection, kind: Kind, recipe: int) -> None:
    """Deletes failures of older recipes, since those recipes may have caused them."""
    connection.execute("DELETE FROM failures WHERE kind = ? AND recipe < ?", (kind, recipe))
    connection.execute(
        "DELETE FROM repository_failures WHERE kind = ? AND recipe < ?", (kind, recipe)
    )


def _row(row: tuple[Any, ...]) -> FailureRow:
    kind, base, target, outcome, *rest = row
    return FailureRow(kind, Digest(base), Digest(target), Outcome(outcome), *rest)
