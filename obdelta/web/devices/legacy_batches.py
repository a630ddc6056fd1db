"""Serves v2 deltas that open-balena-delta left behind, at its own URLs, to clients that may pull
the target.

Its files are in one directory. They are named ``<target's hash>:delta-<first 16 of the base's>``
after the repositories ``v2/<hash>``. Its URL joins that name into a path, without access control.
Here the name must have that form, and a token of the API is required. No supervisor sends a token
to a download, and no answer of obdelta leads here: these deltas were never proven.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from twisted.web.http import Request

from obdelta.concurrency.tasks import Threads
from obdelta.errors import BadRequest, BlobUnknown
from obdelta.oci import Digest
from obdelta.web.devices.access.admission import Admission
from obdelta.web.devices.responses import BINARY, Stored, send_stored

PARAMETER = b"delta"
_NAME = re.compile(r"(?P<target>[0-9a-f]{16,64}):delta-(?P<base>[0-9a-f]{16})", re.ASCII)


class LegacyBatches:
    """Serves the files in ``folder`` for as long as they exist."""

    def __init__(self, folder: Path, admission: Admission, threads: Threads) -> None:
        self._folder, self._admission, self._threads = folder, admission, threads

    @staticmethod
    def matches(query: Mapping[bytes, list[bytes]]) -> bool:
        """Returns whether a download's query has open-balena-delta's form."""
        return set(query) == {PARAMETER}

    async def download(self, request: Request) -> None:
        """Sends the file or a range of it. Raises BadRequest, Unauthorized, Denied, and BlobUnknown
        if there is none.
        """
        values = request.args[PARAMETER]
        name = values[0].decode("latin-1")
        match = _NAME.fullmatch(name)
        if len(values) != 1 or match is None:
            raise BadRequest("the parameter delta is not of the form <hash>:delta-<16 hex>")
        self._admission.admit(request, [f"v2/{match['target']}"])
        found = await self._threads.run(self._size, name)
        if found is None:
            raise BlobUnknown("of this delta")
        size, version = found
        etag = f'"{Digest.of(f"{name} {version}".encode())}"'
        try:
            batch = Stored.open(self._folder / name, size, etag, BINARY)
        except FileNotFoundError as error:
            raise BlobUnknown("of this delta") from error
        send_stored(request, batch)

    def _size(self, name: str) -> tuple[int, int] | None:
        """Returns size and modification time (ns) of a regular file, or None if it is empty,
        missing or unreadable.
        """
        try:
            found = (self._folder / name).lstat()
        except (FileNotFoundError, PermissionError):
            return None
        return (
            (found.st_size, found.st_mtime_ns)
            if stat.S_ISREG(found.st_mode) and found.st_size
            else None
        )
