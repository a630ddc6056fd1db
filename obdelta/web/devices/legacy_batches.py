"""v2 deltas that an open-balena-delta left behind, at its own URLs, for those who may pull their
target.

Its files lie in one folder, named ``<target's hash>:delta-<first 16 of the base's>`` after the
repositories ``v2/<hash>``, and its URL joins that name into a path, for everybody. Here the name
must have that form, and a token of the API is asked for. No supervisor sends one to a download, and
nobody is led here: these deltas were never proven.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from twisted.web.http import Request

from obdelta.concurrency.threads import Threads
from obdelta.errors import BadRequest, BlobUnknown
from obdelta.oci import Digest
from obdelta.web.bodies import send_file
from obdelta.web.devices.admission import Admission

PARAMETER = b"delta"
_NAME = re.compile(r"(?P<target>[0-9a-f]{16,64}):delta-(?P<base>[0-9a-f]{16})", re.ASCII)


class LegacyBatches:
    """Serves what is in ``folder``, for as long as it is there."""

    def __init__(self, folder: Path, admission: Admission, threads: Threads) -> None:
        self._folder, self._admission, self._threads = folder, admission, threads

    @staticmethod
    def wants(query: Mapping[bytes, list[bytes]]) -> bool:
        """Whether a download is asked for in open-balena-delta's way."""
        return set(query) == {PARAMETER}

    async def download(self, request: Request) -> None:
        """The file, or a range of it. Raises BadRequest, Unauthorized, Denied, and BlobUnknown
        where there is none.
        """
        given = request.args[PARAMETER]
        name = given[0].decode("latin-1")
        match = _NAME.fullmatch(name)
        if len(given) != 1 or match is None:
            raise BadRequest("the parameter delta is not of the form <hash>:delta-<16 hex>")
        self._admission.admit(request, [f"v2/{match['target']}"])
        found = await self._threads.run(self._size, name)
        if found is None:
            raise BlobUnknown("of this delta")
        size, version = found
        request.setHeader(b"content-type", b"application/octet-stream")
        try:
            send_file(
                request, self._folder / name, size, f'"{Digest.of(f"{name} {version}".encode())}"'
            )
        except FileNotFoundError as error:
            raise BlobUnknown("of this delta") from error

    def _size(self, name: str) -> tuple[int, int] | None:
        """Size and time of change of a regular file."""
        try:
            found = (self._folder / name).lstat()
        except (FileNotFoundError, PermissionError):
            return None
        return (
            (found.st_size, found.st_mtime_ns)
            if stat.S_ISREG(found.st_mode) and found.st_size
            else None
        )
