"""Signs and verifies expiring URLs of v2 downloads, where devices send no token.

The URL itself is therefore the permission. An HMAC-SHA256 binds it to one pair of contents, recipe,
build, length, delay and expiry time. The key is in ``<state-dir>/url-key`` (0600) and is created
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
    "repository": re.compile(r"[a-z0-9][a-z0-9._/-]{0,255}", re.ASCII),
    "signature": _HEX,
}
"""The query's parameters and their formats. Each is required exactly once, but for the repository,
which may be missing.
"""
_SALT, _COST = b"obdelta: URLs of v2 batches", 1 << 14


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


def derive_key(secret: str) -> bytes:
    """Returns the key that every server derives from a secret. It costs much time (about 50 ms), so
    that a signature does not help to guess a short secret. Blocking.
    """
    return hashlib.scrypt(secret.encode("utf-8"), salt=_SALT, n=_COST, r=8, p=1, dklen=KEY_BYTES)


class Ticket(NamedTuple):
    """The content of a download URL: the delta, the build that made it, length and delay.

    ``made`` is 32 hex digits: the batch's name, or the start of its digest. ``length`` is the
    announced length if the real one was not known, else 0. ``delay`` is the number of tokens that
    keep rsync busy at the end (:mod:`obdelta.rootfs.delay`), 0 for none. ``repository`` is where
    the registry has the batch, "" if it is only here.
    """

    key: DeltaKey
    made: str
    length: int = 0
    delay: int = 0
    repository: str = ""


def made_of(row: DeltaRow) -> str:
    """Returns the ``made`` value of a finished batch, derived from its content."""
    return row.content.hex[:32]


class UrlSigner:
    """Signs and checks the query of download URLs. ``lifetime`` and the clock's time are in
    seconds.
    """

    def __init__(self, key: bytes, now: Callable[[], float], lifetime: float) -> None:
        self.key, self.now, self._lifetime = key, now, lifetime

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
        if ticket.repository:
            fields["repository"] = ticket.repository
        fields["signature"] = self._signature(fields)
        return "&".join(f"{name}={value}" for name, value in fields.items())

    def check(self, query: Mapping[bytes, list[bytes]]) -> Ticket:
        """Returns the ticket of a query. Raises Denied if the query is altered, incomplete,
        duplicated or expired.
        """
        fields: dict[str, str] = {}
        for name, pattern in FIELDS.items():
            values = query.get(name.encode("ascii"), [])
            if name == "repository" and not values:
                continue
            text = values[0].decode("latin-1") if len(values) == 1 else ""
            if pattern.fullmatch(text) is None:
                raise Denied("this download URL was not made here: request the delta again")
            fields[name] = text
        if set(query) - {name.encode("ascii") for name in FIELDS}:
            raise Denied("this download URL was not made here: request the delta again")
        if not hmac.compare_digest(fields["signature"], self._signature(fields)):
            raise Denied("this download URL was not made here: request the delta again")
        if int(fields["expires"]) < self.now():
            raise Denied("this download URL has expired: request the delta again")
        key = DeltaKey(
            "v2", int(fields["recipe"]), Digest(fields["base"]), Digest(fields["target"])
        )
        return Ticket(
            key,
            fields["made"],
            int(fields["length"]),
            int(fields["delay"]),
            fields.get("repository", ""),
        )

    def _signature(self, fields: Mapping[str, str]) -> str:
        # No field's alphabet has a space, and only the last field may be missing, so no two sets of
        # fields give the same text.
        text = " ".join(
            ("obdelta v2", *(value for name, value in fields.items() if name != "signature"))
        )
        return hmac.new(self.key, text.encode("ascii"), hashlib.sha256).hexdigest()
