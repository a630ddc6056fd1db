"""Pulls of devices: those that may outlive their token, and how long downloads of layers took.

Devices, subjects and tokens are kept as hashes, and every number of rows is limited. A pull that
began with a valid token may continue after the token expires. It is in the database because a
restart must not end it, and several server processes share it. The first devices of a target have a
vote on its downloads, and later ones are ignored: no client displaces another's rows.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from obdelta.oci import Digest, Form
from obdelta.store.catalogue.database import Database

MAX_PER_SUBJECT = 32
"""Started pulls of one subject; beyond that, those that end first are deleted."""
MAX_PULLS = 100_000
"""Started pulls in all."""
LATEST = 10**11
"""The latest end of a pull that is stored: later ones are set to it, as SQLite's numbers end."""
KEPT_SECONDS = 86400 * 180
"""Seconds for which a measured download is kept."""
MAX_DEVICES = 256
"""Devices of one target repository and engine generation."""
MAX_LAYERS = 16
"""Rows of one device; the newest stay."""
MAX_DOWNLOADS = 20_000
"""Beyond this the oldest of the target with the most rows are deleted."""

_DELTA = (
    "SELECT details, publications.base_repository FROM manifest_blobs JOIN deltas ON content ="
    " manifest JOIN publications ON delta = id WHERE blob = ? AND kind = 'v3' AND"
    " publications.target_repository = ? ORDER BY id DESC LIMIT 1"
)
_DELETE = (
    "DELETE FROM device_downloads WHERE (device, layer) IN (SELECT device, layer FROM"
    " device_downloads WHERE target_repository = (SELECT target_repository FROM device_downloads"
    " GROUP BY target_repository ORDER BY count(*) DESC LIMIT 1) ORDER BY last LIMIT ?)"
)


@dataclass(frozen=True, slots=True)
class StartedPull:
    """A pull with its token as a hash. ``until``: seconds UTC, when even the expired token ends."""

    token: str
    subject: str
    repository: str
    until: int


class StartedPulls:
    """The table of started pulls."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def includes(
        self, token: str, subject: str, repository: str, blob: Digest, now: float
    ) -> bool:
        """Returns whether this token of this subject fetched a manifest there that names the
        blob.
        """

        def read(connection: sqlite3.Connection) -> bool:
            found = connection.execute(
                "SELECT 1 FROM started_pulls JOIN manifest_blobs ON manifest_blobs.manifest ="
                " started_pulls.manifest WHERE token = ? AND subject = ? AND repository = ? AND"
                " blob = ? AND until > ? LIMIT 1",
                (token, _hashed(subject), repository, blob.hex, int(now)),
            )
            return found.fetchone() is not None

        return await self._database.read(read)


@dataclass(frozen=True, slots=True)
class Download:
    """A download of a whole layer of a delta. ``device`` identifies the device. ``engine``: the
    best form that its engine reads. ``seconds``: for the whole layer.
    """

    repository: str
    layer: Digest
    device: str
    engine: Form
    seconds: float


@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """A recorded download. ``device`` is a hash. ``size`` is that of the blob, ``target_size`` that
    of the layer that ``commands`` make of the base.
    """

    device: str
    base_repository: str
    target_repository: str
    engine: Form
    size: int
    commands: int
    target_size: int
    seconds: float


class DeviceDownloads:
    """The table of downloads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[MeasuredLayer]:
        """Returns all rows, the oldest first."""

        def read(connection: sqlite3.Connection) -> list[MeasuredLayer]:
            rows = connection.execute(
                "SELECT device, base_repository, target_repository, engine, size, commands,"
                " target_size, seconds FROM device_downloads ORDER BY last, device, layer"
            )
            return [
                MeasuredLayer(device, base, target, Form(engine), size, commands, made, seconds)
                for device, base, target, engine, size, commands, made, seconds in rows
            ]

        return await self._database.read(read)

    async def engines(self, base: str, target: str) -> dict[Form, int]:
        """Returns how many devices of an update between two repositories read each form best: those
        that were updated to the base's before, or to the target's already.
        """

        def read(connection: sqlite3.Connection) -> dict[Form, int]:
            rows = connection.execute(
                "SELECT engine, count(DISTINCT device) FROM device_downloads"
                " WHERE target_repository IN (?, ?) GROUP BY engine",
                (base, target),
            )
            return {Form(engine): count for engine, count in rows}

        return await self._database.read(read)


def note_pulls(connection: sqlite3.Connection, pulls: Iterable[tuple[Digest, StartedPull]]) -> None:
    """Records pulls, and deletes those above the limits. Runs in the database's thread."""
    subjects = set()
    for manifest, pull in pulls:
        subject = _hashed(pull.subject)
        subjects.add(subject)
        connection.execute(
            "INSERT OR REPLACE INTO started_pulls VALUES (?, ?, ?, ?, ?)",
            (pull.token, manifest.hex, pull.repository, subject, min(pull.until, LATEST)),
        )
    if not subjects:
        return
    for subject in subjects:
        connection.execute(
            "DELETE FROM started_pulls WHERE subject = ?1 AND (token, manifest, repository) IN"
            " (SELECT token, manifest, repository FROM started_pulls WHERE subject = ?1"
            " ORDER BY until DESC LIMIT -1 OFFSET ?2)",
            (subject, MAX_PER_SUBJECT),
        )
    connection.execute(
        "DELETE FROM started_pulls WHERE until < (SELECT until FROM started_pulls ORDER BY until"
        " DESC LIMIT 1 OFFSET ?)",
        (MAX_PULLS - 1,),
    )


def note_downloads(
    connection: sqlite3.Connection, downloads: Iterable[tuple[Download, int]]
) -> None:
    """Records downloads with their times, if they are of a delta's layers, and deletes rows above
    the limits. Runs in the database's thread.
    """
    devices = set()
    for download, now in downloads:
        device = _hashed(download.device)
        if _insert(connection, download, device, now):
            devices.add(device)
    if not devices:
        return
    for device in devices:
        connection.execute(
            "DELETE FROM device_downloads WHERE device = ?1 AND layer IN (SELECT layer FROM"
            " device_downloads WHERE device = ?1 ORDER BY last DESC LIMIT -1 OFFSET ?2)",
            (device, MAX_LAYERS),
        )
    (rows,) = connection.execute("SELECT count(*) FROM device_downloads").fetchone()
    surplus = rows - MAX_DOWNLOADS
    while surplus > 0:
        # In steps, since another target has the most rows after each.
        some = (surplus + 1) // 2
        connection.execute(_DELETE, (some,))
        surplus -= some


def _insert(connection: sqlite3.Connection, download: Download, device: str, now: int) -> bool:
    found = connection.execute(_DELTA, (download.layer.hex, download.repository)).fetchone()
    if found is None:
        return False  # the delta was removed meanwhile
    figures = _figures(json.loads(found[0]), download.layer)
    if figures is None or not _has_vote(connection, download, device):
        return False
    connection.execute(
        "INSERT OR REPLACE INTO device_downloads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            device,
            download.layer.hex,
            found[1],
            download.repository,
            download.engine.value,
            *figures,
            download.seconds,
            now,
        ),
    )
    return True


def _has_vote(connection: sqlite3.Connection, download: Download, device: str) -> bool:
    key = (download.repository, download.engine.value)
    rows = connection.execute(
        "SELECT DISTINCT device FROM device_downloads WHERE target_repository = ? AND engine = ?"
        " LIMIT ?",
        (*key, MAX_DEVICES),
    ).fetchall()
    return len(rows) < MAX_DEVICES or (device,) in rows


def _figures(details: Mapping[str, Any], digest: Digest) -> tuple[int, int, int] | None:
    """Returns size, commands and target size of a layer from the delta's record."""
    for layer in details.get("layers", ()):
        if layer.get("digest") == str(digest) and "copies" in layer:
            copies = int(layer["copies"])
            # Earlier versions did not record literals: there is about one a copy.
            commands = copies + int(layer.get("literals", copies))
            return int(layer["size"]), commands, int(layer["copied_bytes"] + layer["literal_bytes"])
    return None  # its config, or a layer that a balena-engine built


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
