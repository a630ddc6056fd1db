"""Failed builds: verdicts on contents by their digests and form, work that ran over its time by the
digests of layers, all other failures by the pair of repositories.

The functions run in the database's thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from obdelta.oci import Digest, Form
from obdelta.store.catalogue.database import Database
from obdelta.store.catalogue.records import FailureRow, Kind, Outcome

MEMORY_SECONDS = 86400
"""Seconds until slow work is forgotten: by then a quieter machine or another version may succeed.
"""
_VERDICTS = """
    SELECT kind, base, target, outcome, reason, count, last, base_repository, target_repository,
        recipe, form, '' FROM failures """
_ERRORS = """
    SELECT kind, base, target, 'error', reason, count, last, base_repository, target_repository,
        recipe, '', work FROM repository_failures """
_OF_PAIR = "WHERE kind = ? AND base = ? AND target = ? AND last > ?"


class RecordedFailures:
    """The tables of failures in the catalogue's database. Raises Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def remember(
        self,
        kind: Kind,
        base: Digest,
        target: Digest,
        outcome: Outcome,
        reason: str,
        now: int,
        memory_seconds: int,
        *,
        times: int = 1,
        repositories: tuple[str, str] = ("", ""),
        recipe: int = 0,
        form: Form | None = None,
        work: Digest | None = None,
    ) -> FailureRow:
        """Adds ``times`` failures of a pair; the count restarts if the last failure has expired by
        now.

        ``repositories``: of base and target. Errors are remembered for these only, and for every
        form; verdicts on the contents for all repositories that have them, and for ``form`` only,
        if it is given. ``recipe``: that of the build; see :func:`outdated`. ``work``: the key
        of work that ran over its time.
        """
        row = FailureRow(
            kind, base, target, outcome, reason, times, now, *repositories, recipe, form, work
        )
        return await self._database.write(
            lambda connection: remember(connection, row, now - memory_seconds)
        )

    async def find(
        self,
        kind: Kind,
        base: Digest,
        target: Digest,
        now: int,
        memory_seconds: int,
        repositories: tuple[str, str] = ("", ""),
        form: Form | None = None,
    ) -> FailureRow | None:
        """Returns how a pair of these repositories failed in ``form`` or in every form, if that is
        younger than ``memory_seconds``.
        """
        after = now - memory_seconds
        return await self._database.read(
            lambda connection: find(connection, kind, base, target, repositories, form, after)
        )

    async def all(self, now: int, memory_seconds: int) -> list[FailureRow]:
        """Returns all failures that are younger than ``memory_seconds``, latest first."""
        return await self._database.read(
            lambda connection: later_than(connection, now - memory_seconds)
        )

    async def forget(self, kind: Kind, base: Digest, target: Digest) -> None:
        """Deletes the failures of a pair, because it was built."""
        await self._database.write(lambda connection: forget(connection, kind, base, target))

    async def forget_with_work(self, kind: Kind, base: Digest, target: Digest) -> None:
        """Deletes the failures of a pair and the work that ran over its time in them, because a new
        attempt was requested.
        """

        def both(connection: sqlite3.Connection) -> None:
            forget_work(connection, kind, base, target)
            forget(connection, kind, base, target)

        await self._database.write(both)


def find(
    connection: sqlite3.Connection,
    kind: Kind,
    base: Digest,
    target: Digest,
    repositories: tuple[str, str],
    form: Form | None,
    after: int,
) -> FailureRow | None:
    """Returns how a pair failed last, if later than ``after``: a verdict on its contents in this
    form, or in every form; else a failure of these repositories.
    """
    pair = (kind, base.hex, target.hex, after)
    row = connection.execute(
        f"{_VERDICTS}{_OF_PAIR} AND form IN ('', ?) ORDER BY last DESC", (*pair, _text(form))
    ).fetchone()
    if row is None:
        rest = " AND base_repository = ? AND target_repository = ?"
        row = connection.execute(_ERRORS + _OF_PAIR + rest, (*pair, *repositories)).fetchone()
    return None if row is None else _row(row)


def remember(connection: sqlite3.Connection, failure: FailureRow, after: int) -> FailureRow:
    """Adds to the failures of the same kind that are later than ``after``; returns all of them as
    one row.
    """
    repositories = (failure.base_repository, failure.target_repository)
    found = find(
        connection,
        failure.kind,
        failure.base,
        failure.target,
        repositories,
        failure.form,
        after,
    )
    count = failure.count + (found.count if found is not None else 0)
    pair = (failure.kind, failure.base.hex, failure.target.hex)
    values = (failure.reason, count, failure.last, *repositories, failure.recipe)
    work = failure.work or (found.work if found is not None else None)
    if failure.outcome is Outcome.ERROR:
        connection.execute(
            "INSERT OR REPLACE INTO repository_failures (kind, base, target, reason, count, last,"
            " base_repository, target_repository, recipe, work)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*pair, *values, "" if work is None else work.hex),
        )
    else:
        connection.execute(
            "DELETE FROM repository_failures WHERE kind = ? AND base = ? AND target = ? AND"
            " base_repository = ? AND target_repository = ?",
            (*pair, *repositories),
        )
        connection.execute(
            "INSERT OR REPLACE INTO failures (kind, base, target, form, outcome, reason, count,"
            " last, base_repository, target_repository, recipe)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*pair, _text(failure.form), failure.outcome.value, *values),
        )
    return FailureRow(
        failure.kind,
        failure.base,
        failure.target,
        failure.outcome,
        failure.reason,
        count,
        *values[2:],
        form=failure.form,
        work=work,
    )


def later_than(connection: sqlite3.Connection, after: int) -> list[FailureRow]:
    """Returns all failures later than ``after``, latest first."""
    statement = (
        f"{_VERDICTS} WHERE last > ?1 UNION ALL {_ERRORS} WHERE last > ?1 ORDER BY last DESC"
    )
    return [_row(row) for row in connection.execute(statement, (after,))]


def forget(connection: sqlite3.Connection, kind: Kind, base: Digest, target: Digest) -> None:
    """Deletes the failures of a pair, in all repositories and forms."""
    for table in ("failures", "repository_failures"):
        connection.execute(
            f"DELETE FROM {table} WHERE kind = ? AND base = ? AND target = ?",  # noqa: S608 - one of two constants
            (kind, base.hex, target.hex),
        )


def forget_work(connection: sqlite3.Connection, kind: Kind, base: Digest, target: Digest) -> None:
    """Deletes the work that ran over its time in the failures of a pair. Failures that earlier
    versions recorded name no work: it is found by its reason.
    """
    connection.execute(
        "DELETE FROM slow_work WHERE EXISTS (SELECT 1 FROM repository_failures AS failed"
        " WHERE kind = ? AND base = ? AND target = ? AND (failed.work = slow_work.key"
        " OR (failed.work = '' AND instr(failed.reason, slow_work.reason))))",
        (kind, base.hex, target.hex),
    )


def outdated(connection: sqlite3.Connection, kind: Kind, recipe: int) -> None:
    """Deletes failures of older recipes, since those recipes may have caused them."""
    connection.execute("DELETE FROM failures WHERE kind = ? AND recipe < ?", (kind, recipe))
    connection.execute(
        "DELETE FROM repository_failures WHERE kind = ? AND recipe < ?", (kind, recipe)
    )


def _row(row: tuple[Any, ...]) -> FailureRow:
    kind, base, target, outcome, *rest, form, work = row
    rest += [Form(form) if form else None, Digest(work) if work else None]
    return FailureRow(kind, Digest(base), Digest(target), Outcome(outcome), *rest)


def _text(form: Form | None) -> str:
    return "" if form is None else form.value


def work_key(work: str, *images: Iterable[Digest]) -> Digest:
    """Returns the key of a kind of work on the layers of images, bottom to top."""
    lines = [work, *("layers " + " ".join(map(str, layers)) for layers in images)]
    return Digest.of("\n".join(lines).encode())


class SlowWork:
    """The table of work that ran over its time, keyed by layer contents: a new manifest over the
    same layers does not repeat it. Times are seconds UTC.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def remember(self, key: Digest, reason: str, now: int) -> None:
        """Records that work ran over its time."""

        def note(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO slow_work VALUES (?, ?, ?)", (key.hex, reason, now)
            )

        await self._database.write(note)

    async def reason(self, key: Digest, now: int) -> str | None:
        """Returns how the work failed, or None if no row remembers it."""

        def find(connection: sqlite3.Connection) -> str | None:
            row = connection.execute(
                "SELECT reason FROM slow_work WHERE key = ? AND last > ?",
                (key.hex, now - MEMORY_SECONDS),
            ).fetchone()
            return None if row is None else str(row[0])

        return await self._database.read(find)

    async def forget(self, key: Digest) -> None:
        """Deletes the record of work, so that it is tried again."""
        await self._database.write(
            lambda connection: connection.execute("DELETE FROM slow_work WHERE key = ?", (key.hex,))
        )
