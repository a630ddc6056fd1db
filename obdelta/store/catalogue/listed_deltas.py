"""The list of deltas for operators: kept deltas and failures, filtered, sorted and in pages.

Everything here runs in the database's thread, and reads every row.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from obdelta.oci import Digest, Form, ImageNames
from obdelta.store.catalogue.records import DeltaKey, FailureRow, Kind
from obdelta.store.fleets import Fleets

SORTS: Final = {
    "newest": "since",
    "size": "coalesce(bytes, 0)",
    "saved": "saved",
    "served": "served",
    "used": "coalesce(used, 0)",
}
"""The orders of the list and what they sort by, greatest first."""
_ENTRIES = """
    SELECT listed_id(kind, base, target, form) AS id, kind, recipe, base, target, form,
        base_repository, target_repository, 'kept' AS state, delta_bytes AS bytes, full_bytes,
        served * max(0, full_bytes - delta_bytes) AS saved, served, created AS made,
        CASE WHEN served > 0 THEN last_served END AS used, pinned, '' AS reason,
        created AS since, coalesce(tag, '') AS tag
    FROM deltas
    UNION ALL
    SELECT listed_id(kind, base, target, coalesce(nullif(form, ''), :universal)), kind, recipe,
        base, target, coalesce(nullif(form, ''), :universal), base_repository, target_repository,
        CASE WHEN outcome IN ('not worth', 'unusable') THEN 'skipped' ELSE 'failed' END,
        NULL, NULL, 0, 0, NULL, NULL, 0, reason, last, ''
    FROM failures AS known WHERE last > :after AND NOT (form = '' AND EXISTS (
        SELECT 1 FROM failures WHERE failures.kind = known.kind AND failures.base = known.base
            AND failures.target = known.target AND failures.form = :universal))
    UNION ALL
    SELECT listed_id(kind, base, target, :universal), kind, recipe, base, target, :universal,
        base_repository, target_repository, 'failed', NULL, NULL, 0, 0, NULL, NULL, 0, reason,
        max(last), ''
    FROM repository_failures WHERE last > :after AND NOT EXISTS (
        SELECT 1 FROM failures WHERE failures.kind = repository_failures.kind
            AND failures.base = repository_failures.base
            AND failures.target = repository_failures.target)
    GROUP BY kind, base, target"""
_NAMES = """
    coalesce((
        SELECT searchable(fleet, service, "release", "commit") FROM fleet_images
        WHERE manifest = OF ORDER BY last DESC LIMIT 1
    ), (
        SELECT searchable(fleet, service, "release", "commit") FROM image_names WHERE manifest = OF
    ), '')"""
_TEXT = f"""
    CASE WHEN :words = '[]' THEN '' ELSE lowered(
        id || ' ' || base_repository || ' ' || target_repository || ' sha256:' || base
        || ' sha256:' || target || ' ' || tag || ' ' || reason
        || ' ' || {_NAMES.replace("OF", "base")} || ' ' || {_NAMES.replace("OF", "target")}
    ) END"""
# The text is made once an entry, and not once a word.
_PAGE = """
    WITH entry AS MATERIALIZED (SELECT *, TEXT AS text FROM (ENTRIES))
    SELECT *, ORDER_BY AS value FROM entry
    WHERE (:kind = '' OR kind = :kind) AND (:form = '' OR form = :form)
        AND (:state = '' OR state = :state OR (:state = 'pinned' AND pinned))
        AND (:fleet IS NULL OR target_repository IN (SELECT value FROM json_each(:fleet)))
        AND NOT EXISTS (SELECT 1 FROM json_each(:words) AS word WHERE NOT instr(text, word.value))
        AND id NOT IN (SELECT value FROM json_each(:without))
        AND (:value IS NULL OR (ORDER_BY, id) < (:value, :id))
    ORDER BY value DESC, id DESC LIMIT :limit""".replace("TEXT", _TEXT).replace("ENTRIES", _ENTRIES)
_ONE = """
    SELECT * FROM (ENTRIES) WHERE id = :id
    ORDER BY state != 'kept', recipe DESC LIMIT 1""".replace("ENTRIES", _ENTRIES)


_NAMED = "(fleet = :name COLLATE NOCASE OR fleet || '/' || service = :name COLLATE NOCASE)"
_OF_NAME = f"""
    WITH named AS (
        SELECT manifest FROM fleet_images WHERE {_NAMED}
        UNION ALL
        SELECT manifest FROM image_names
        WHERE {_NAMED} AND manifest NOT IN (SELECT manifest FROM fleet_images)
    )
    SELECT target_repository FROM deltas WHERE target IN named
    UNION SELECT target_repository FROM failures WHERE target IN named"""  # noqa: S608


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFilter:
    """Selects entries; an empty value selects all. ``fleet``: target repositories, None: all.

    ``search``: words, all of which an entry's repositories, digests, ID, tag or reason contain, or
    the names of its images.
    """

    kind: str = ""
    form: str = ""
    state: str = ""
    search: str = ""
    fleet: frozenset[str] | None = None

    @property
    def words(self) -> list[str]:
        """The words of the search, in lower case."""
        return self.search.lower().split()


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedDelta:
    """One entry. ``state``: ``kept``, ``building``, ``queued``, ``failed``, ``skipped``, or
    ``gone`` once an action has removed it.

    ``key.form`` is the universal one for a failure of every form. ``saved``: bytes that devices did
    not have to pull so far. ``since``: the time of the state. All times are in seconds UTC.
    """

    id: str
    key: DeltaKey
    base_repository: str
    target_repository: str
    state: str
    bytes: int | None = None
    full_bytes: int | None = None
    saved: int = 0
    served: int = 0
    made: int | None = None
    used: int | None = None
    pinned: bool = False
    reason: str = ""
    since: int = 0
    tag: str = ""

    @property
    def src(self) -> str:
        """The base, as ``repository@digest``; the digest alone if no repository is recorded."""
        return f"{self.base_repository}@{self.key.base}".removeprefix("@")

    @property
    def dest(self) -> str:
        """The target in the same way."""
        return f"{self.target_repository}@{self.key.target}".removeprefix("@")

    def value(self, sort: str) -> int:
        """Returns what an order of :data:`SORTS` sorts by."""
        values = {
            "newest": self.since,
            "size": self.bytes or 0,
            "saved": self.saved,
            "served": self.served,
            "used": self.used or 0,
        }
        return values[sort]

    def matches(self, wanted: ListFilter, names: Mapping[Digest, ImageNames]) -> bool:
        """Returns whether the filter selects the entry, as :func:`page` does. ``names``: what
        images call themselves.
        """
        named = [names[one].searchable for one in (self.key.base, self.key.target) if one in names]
        text = " ".join([self.id, self.src, self.dest, self.tag, self.reason, *named]).lower()
        return (
            wanted.kind in ("", self.key.kind)
            and wanted.form in ("", self.key.form.value)
            and (wanted.state in ("", self.state) or (wanted.state == "pinned" and self.pinned))
            and (wanted.fleet is None or self.target_repository in wanted.fleet)
            and all(word in text for word in wanted.words)
        )


def listed_id(kind: str, base: str, target: str, form: str) -> str:
    """Returns the ID of a pair, kind and form: 16 hex digits, the same for ever."""
    return hashlib.sha256(f"{kind} {base} {target} {form}".encode()).hexdigest()[:16]


def id_of_key(key: DeltaKey) -> str:
    """Returns the ID of a delta, whatever its recipe."""
    return listed_id(key.kind, key.base.hex, key.target.hex, key.form.value)


def page(
    connection: sqlite3.Connection,
    wanted: ListFilter,
    sort: str,
    limit: int,
    *,
    after: int,
    before: tuple[int, str] | None = None,
    without: Collection[str] = (),
) -> list[ListedDelta]:
    """Returns entries in the order ``sort``, at most ``limit``. Failures before ``after`` are left
    out, and so are the IDs ``without``.

    ``before``: the value and the ID of the entry that the page follows.
    """
    _add_functions(connection)
    fleet = None if wanted.fleet is None else json.dumps(sorted(wanted.fleet))
    value, id_ = before or (None, None)
    rows = connection.execute(
        _PAGE.replace("ORDER_BY", SORTS[sort]),
        {
            "kind": wanted.kind,
            "form": wanted.form,
            "universal": Form.UNIVERSAL.value,
            "state": wanted.state,
            "fleet": fleet,
            "words": json.dumps(wanted.words),
            "without": json.dumps(list(without)),
            "value": value,
            "id": id_,
            "after": after,
            "limit": limit,
        },
    )
    return [_entry(row) for row in rows]


def _add_functions(connection: sqlite3.Connection) -> None:
    connection.create_function("listed_id", 4, listed_id, deterministic=True)
    connection.create_function("lowered", 1, str.lower, deterministic=True)
    connection.create_function("searchable", 4, _searchable, deterministic=True)


def _searchable(*names: str) -> str:
    return ImageNames(*names).searchable


def find(connection: sqlite3.Connection, id_: str, after: int) -> ListedDelta | None:
    """Returns the entry of an ID: the kept delta of the newest recipe, else the failure."""
    _add_functions(connection)
    values = {"id": id_, "after": after, "universal": Form.UNIVERSAL.value}
    row = connection.execute(_ONE, values).fetchone()
    return None if row is None else _entry(row)


def fleet_of(connection: sqlite3.Connection, repository: str, name: str) -> frozenset[str]:
    """Returns the target repositories of the fleet that a repository belongs to. Adds those whose
    images call their fleet ``name``, or ``fleet/service``; "": none.
    """
    statements = (
        "SELECT base_repository, target_repository FROM publications"
        " ORDER BY delta, target_repository, base_repository",
        "SELECT base_repository, target_repository FROM failures",
        "SELECT base_repository, target_repository FROM repository_failures",
    )
    rows = [row for statement in statements for row in connection.execute(statement)]
    fleets = Fleets(limit=2 * len(rows) + 1)
    for base, target in rows:
        fleets.of(base, target)
    wanted = fleets.fleet(repository)
    members = (target for _, target in rows if fleets.fleet(target) == wanted)
    named = [row[0] for row in connection.execute(_OF_NAME, {"name": name})] if name else []
    return frozenset((repository, *members, *named))


def _entry(row: tuple[Any, ...]) -> ListedDelta:
    id_, kind, recipe, base, target, form, base_repository, target_repository, state = row[:9]
    size, full, saved, served, made, used, pinned, reason, since, tag = row[9:19]
    known: Kind = kind
    return ListedDelta(
        id=id_,
        key=DeltaKey(known, recipe, Digest(base), Digest(target), Form(form)),
        base_repository=base_repository,
        target_repository=target_repository,
        state=state,
        bytes=size,
        full_bytes=full,
        saved=saved,
        served=served,
        made=made,
        used=used,
        pinned=bool(pinned),
        reason=reason,
        since=since,
        tag=tag,
    )


def id_of_failure(row: FailureRow) -> str:
    """Returns the ID under which a failure is listed."""
    return listed_id(row.kind, row.base.hex, row.target.hex, (row.form or Form.UNIVERSAL).value)
