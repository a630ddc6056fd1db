"""Signs and verifies expiring URLs of v2 downloads, where devices send no token.

The URL itself is therefore the permission. An HMAC-SHA256 binds it to one pair of contents, recipe,
build, length, delay and expiry time. The key lies in ``<state-dir>/url-key`` (0600) and is created
at first use. Removing it invalidates every URL issued so far.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from obdelta.errors import Denied, SettingsError
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaKey, DeltaRow
from obdelta.store.ownership import KEY_BYTES

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
FIELDS: Mapping[str, re.Pattern[str]] = {
    "base": _HEX,
    "target": _HEX,
    "recipe": _NUMBER,
    "made": re.compile(r"[0-9a-f]{32}", re.ASCII),
    "length": _NUMBER,
    "delay": _NUMBER,
    "expires": _NUMBER,
    "signature": _HEX,
}
"""The query's parameters, each required exactly once, and their formats."""


def load_key(path: Path) -> bytes:
    """Returns the key in the file, which is created if it is missing. Raises SettingsError for a
    file without a key. Blocking: for start-up only.
    """
    if not path.exists():
        # Written under another name and then linked: a key is complete as soon as its name
        # exists, and if two processes start at once, the first key stays.
        tmp = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, secrets.token_bytes(KEY_BYTES))
            os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(tmp)
        finally:
            os.close(descriptor)
            tmp.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise SettingsError(
            "state-dir", str(path.parent), f"a key of {KEY_BYTES} bytes in its file {path.name}"
        )
    return key


class Ticket(NamedTuple):
    """The content of a download URL: the delta, the build that made it, length and delay.

    ``made`` is 32 hex digits: the batch's name, or the start of its digest. ``length`` is the
    announced length if the real one was not known, else 0. ``delay`` is the number of tokens that
    keep rsync busy at the end (:mod:`obdelta.rootfs.delay`), 0 for none.
    """

    key: DeltaKey
    made: str
    length: int = 0
    delay: int = 0


def made_of(row: DeltaRow) -> str:
    """Returns the ``made`` value of a finished batch, derived from its content."""
    return row.content.hex[:32]


class UrlSigner:
    """Signs and checks the query of download URLs. ``lifetime`` and the clock's time are in
    seconds.
    """

    def __init__(self, key: bytes, now: Callable[[], float], lifetime: float) -> None:
        self._key, self.now, self._lifetime = key, now, lifetime

    def sign(self, ticket: Ticket) -> str:
        """Returns the query for one delta, without ``?``; valid from now for the lifetime."""
        key = ticket.key
        fields = {
            "base": key.base.hex,
            "target": key.target.hex,
            "recipe": str(key.recipe),
            "made": ticket.made,
            "length": str(ticket.length),
            "delay": str(ticket.delay),
            "expires": str(int(self.now() + self._lifetime)),
        }
        fields["signature"] = self._signature(fields)
        return "&".join(f"{name}={value}" for name, value in fields.items())

    def check(self, query: Mapping[bytes, list[bytes]]) -> Ticket:
        """Returns the ticket of a query. Raises Denied if the query is altered, incomplete,
        duplicated or expired.
        """
        fields: dict[str, str] = {}
        for name, pattern in FIELDS.items():
            values = query.get(name.encode("ascii"), [])
            text = values[0].decode("latin-1") if len(values) == 1 else ""
            if pattern.fullmatch(text) is None:
                raise Denied("this download URL was not made here")
            fields[name] = text
        if set(query) - {name.encode("ascii") for name in FIELDS}:
            raise Denied("this download URL was not made here")
        if not hmac.compare_digest(fields["signature"], self._signature(fields)):
            raise Denied("this download URL was not made here")
        if int(fields["expires"]) < self.now():
            raise Denied("this download URL has expired")
        key = DeltaKey(
            "v2", int(fields["recipe"]), Digest(fields["base"]), Digest(fields["target"])
        )
        return Ticket(key, fields["made"], int(fields["length"]), int(fields["delay"]))

    def _signature(self, fields: Mapping[str, str]) -> str:
        # No field's alphabet has a space, so no two sets of fields give the same text.
        text = " ".join(
            ("obdelta v2", *(value for name, value in fields.items() if name != "signature"))
        )
        return hmac.new(self._key, text.encode("ascii"), hashlib.sha256).hexdigest()
