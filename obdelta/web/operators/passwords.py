"""Passwords of operators: a file with one line a user, hashed with scrypt (RFC 7914).

A line is ``NAME:$scrypt$ln=14,r=8,p=1$SALT$HASH``, in base64 without padding (the PHC string
format, as Python's passlib writes it). ``obdelta password`` prints one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from twisted.logger import Logger

from obdelta.concurrency.watched_file import FileProblem, WatchedFiles
from obdelta.errors import SettingsError

log = Logger()

LOG_N, R, P = 14, 8, 1
"""Cost of new hashes: 16 MiB, and about 50 ms."""
MAX_MEMORY = 64 << 20
MAX_FILE = 1 << 20
_NAME = r"[A-Za-z0-9._@-]{1,64}"
_LINE = re.compile(
    rf"({_NAME}):\$scrypt\$ln=([0-9]{{1,2}}),r=([0-9]{{1,2}}),p=([0-9]{{1,2}})"
    r"\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{22,86})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """One line of the file."""

    log_n: int
    r: int
    p: int
    salt: bytes
    digest: bytes

    def matches(self, password: str) -> bool:
        """Returns whether this is the hash of a password. Blocking: about 50 ms."""
        found = hashlib.scrypt(
            password.encode("utf-8", "surrogateescape"),
            salt=self.salt,
            n=1 << self.log_n,
            r=self.r,
            p=self.p,
            maxmem=MAX_MEMORY,
            dklen=len(self.digest),
        )
        return hmac.compare_digest(found, self.digest)


def make_line(name: str, password: str) -> str:
    """Returns the line of a user. Raises ValueError for a name that has no line."""
    if not re.fullmatch(_NAME, name, re.ASCII):
        raise ValueError("a name has 1 to 64 letters, digits and ._@-")
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(
        password.encode(), salt=salt, n=1 << LOG_N, r=R, p=P, maxmem=MAX_MEMORY, dklen=32
    )
    return f"{name}:$scrypt$ln={LOG_N},r={R},p={P}${_encoded(salt)}${_encoded(digest)}"


def parse(text: str) -> dict[str, PasswordHash]:
    """Returns the hashes by user. Empty lines and those that begin with ``#`` count for nothing.

    Raises ValueError, which names the line.
    """
    found: dict[str, PasswordHash] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not one that `obdelta password` prints")
        if match[1] in found:
            raise ValueError(f"line {number} names a user for the second time")
        log_n, r, p = int(match[2]), int(match[3]), int(match[4])
        if not (1 <= log_n <= 20 and r and p and 128 * r * (1 << log_n) * p < MAX_MEMORY):
            raise ValueError(f"line {number} has a cost that would take more than 64 MiB")
        try:
            found[match[1]] = PasswordHash(log_n, r, p, _decoded(match[5]), _decoded(match[6]))
        except binascii.Error as error:
            raise ValueError(f"line {number} is cut off") from error
    if not found:
        raise ValueError("it has no user")
    return found


class PasswordFile:
    """The file, read again when it changes. A change that cannot be read is logged, and locks all
    users out: a revoked password must not stay valid.
    """

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        """Reads the file. Raises SettingsError."""
        self._path, self._now = path, now
        self._problem: FileProblem | None = None
        self._watched = WatchedFiles([path], now)
        try:
            self._users: Mapping[str, PasswordHash] = self._read()
        except ValueError as error:
            raise SettingsError(
                "operator-passwords", str(path), f"a file with lines of `obdelta password`: {error}"
            ) from error

    def hash_of(self, name: str) -> PasswordHash | None:
        """Returns the hash of a user's password, None for an unknown user."""
        self._refresh()
        return self._users.get(name)

    def problem(self) -> FileProblem | None:
        """Returns why the file cannot be used any more, None if it can."""
        self._refresh()
        return self._problem

    def _refresh(self) -> None:
        if not self._watched.changed():
            return
        try:
            self._users, self._problem = self._read(), None
        except ValueError as error:
            self._users = {}
            since = self._now() if self._problem is None else self._problem.since
            self._problem = FileProblem(self._path, str(error), since, "operator-passwords")
            log.error(
                "operator-passwords: {path} cannot be used: {reason}: no one can log in until"
                " the file is repaired",
                path=str(self._path),
                reason=str(error),
            )

    def _read(self) -> dict[str, PasswordHash]:
        try:
            with self._path.open("rb") as file:
                writable = os.fstat(file.fileno()).st_mode & stat.S_IWOTH
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise ValueError(error.strerror or "it cannot be read") from error
        if writable:
            raise ValueError("every user of this machine may write it (chmod o-w)")
        if len(data) > MAX_FILE:
            raise ValueError("it is too large")
        try:
            return parse(data.decode("ascii"))
        except UnicodeDecodeError as error:
            raise ValueError("it has bytes that are not ASCII") from error


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
