"""The names that a balena-engine holds for obdelta's builds, so that they are removed there even
after a crash.
"""

from __future__ import annotations

import sqlite3

from obdelta.store.catalogue.database import Database


class EngineImages:
    """The table of such names in the catalogue's database. Everything raises Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, name: str, image: str = "") -> None:
        """Records that the engine is about to get an image of this name. ``image`` is its ID,
        ``""`` if it is not known yet.
        """

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO engine_names VALUES (?, ?)", (name, image))

        await self._database.write(write)

    async def remove(self, name: str) -> None:
        """Deletes a name that the engine no longer has."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM engine_names WHERE name = ?", (name,))

        await self._database.write(write)

    async def all(self) -> dict[str, str]:
        """Returns image IDs by name."""

        def read(connection: sqlite3.Connection) -> dict[str, str]:
            return dict(
                connection.execute("SELECT name, image FROM engine_names ORDER BY name").fetchall()
            )

        return await self._database.read(read)
