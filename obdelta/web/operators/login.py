"""Logins of those who act: operators with a password, users of a proxy, commands on this machine.

Reading needs no login. Without settings, only commands on this machine may act.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from dataclasses import dataclass

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.server import Request

from obdelta.concurrency.limits import Limit
from obdelta.concurrency.tasks import Threads
from obdelta.concurrency.watched_file import FileProblem
from obdelta.errors import Denied, ObdeltaError
from obdelta.net.client_address import TrustedProxies, host_of
from obdelta.web.operators.passwords import PasswordFile, parse

log = Logger()

LOGINS = 4
"""Passwords that are checked at a time, and that one address may have under way."""
WRONG_SECONDS = 1.0
"""Seconds until a wrong password is answered: few can be guessed, and the time does not tell
whether the user exists.
"""
CHALLENGE = 'Basic realm="obdelta", charset="UTF-8"'
LOCAL = "local"
"""The user of commands that can read ``state-dir``."""
_UNKNOWN = parse("x:$scrypt$ln=14,r=8,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA")["x"]
"""Checked for unknown users: the answer takes as long as for known ones."""
_USER = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)


class LoginRequired(ObdeltaError):
    """The request has no login, or a wrong one: 401."""


class ActionsOff(Denied):
    """No setting says who may act."""

    def __init__(self) -> None:
        super().__init__(
            "actions are off at this address: set operator-passwords or operator-proxy, or run the"
            " obdelta command where it can read state-dir (docs: operators.md, Acting)"
        )


@dataclass(frozen=True, slots=True)
class ProxyLogin:
    """A proxy that has checked the login, and names the user in ``header``."""

    header: str
    proxies: TrustedProxies
    unix: bool
    """Whether a proxy may connect by a Unix socket."""


class ActionGuard:
    """Decides who may act. ``key``: the key in ``state-dir``, which commands send."""

    def __init__(
        self,
        key: bytes,
        threads: Threads,
        clock: IReactorTime,
        passwords: PasswordFile | None = None,
        proxy: ProxyLogin | None = None,
    ) -> None:
        self._key, self._threads, self._clock = key.hex(), threads, clock
        self._passwords, self._proxy = passwords, proxy
        self._checks = Limit(LOGINS, "checks of passwords")
        self._logins = Limit(LOGINS, "logins of an address")
        self.form_token = secrets.token_urlsafe(24)
        """In every form of the pages: no page of another site can read it."""

    @property
    def enabled(self) -> bool:
        """Whether a browser can act: then pages have buttons."""
        return self._passwords is not None or self._proxy is not None

    def file_problem(self) -> FileProblem | None:
        """Returns why the file of passwords cannot be used any more, None if it can."""
        return None if self._passwords is None else self._passwords.problem()

    async def user(self, request: Request) -> str:
        """Returns the user who may act. Raises LoginRequired, Denied, TooManyRequests."""
        scheme, _, given = (request.getHeader(b"authorization") or b"").partition(b" ")
        if scheme.lower() == b"bearer":
            if hmac.compare_digest(given.strip(), self._key.encode()):
                return LOCAL
            raise LoginRequired("the key is not that of state-dir's file operator-key")
        if self._proxy is not None and (name := self._named_by(self._proxy, request)):
            return name
        if self._passwords is None:
            if self._proxy is None:
                raise ActionsOff
            raise Denied("actions need the proxy that operator-proxy names, and its login")
        if scheme.lower() != b"basic":
            raise LoginRequired("log in as a user of operator-passwords")
        return await self._by_password(self._passwords, given.strip(), request)

    def client(self, request: Request) -> str:
        """Returns whom limits count a request for: the user whom the proxy of ``operator-proxy``
        names, else the address. A password is not checked for requests that only read.
        """
        try:
            user = self._named_by(self._proxy, request) if self._proxy is not None else None
        except Denied:
            user = None
        return f"user {user}" if user else host_of(request.getClientAddress()) or "-"

    def check_form(self, token: str) -> None:
        """Raises Denied for a form that no page of this server's has."""
        if not hmac.compare_digest(token.encode(), self.form_token.encode()):
            raise Denied("the page is older than the server's last start: load it again")

    def _named_by(self, proxy: ProxyLogin, request: Request) -> str | None:
        address = request.getClientAddress()
        if not (proxy.proxies.trusts(address) if host_of(address) else proxy.unix):
            return None
        lines = request.requestHeaders.getRawHeaders(proxy.header.encode("ascii"))
        if not lines:
            return None
        name = lines[0].decode("latin-1")
        if len(lines) > 1 or not _USER.fullmatch(name):
            raise Denied(f"{proxy.header} names no user, or several")
        return name

    async def _by_password(self, passwords: PasswordFile, given: bytes, request: Request) -> str:
        try:
            name, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError) as error:
            raise LoginRequired("the login cannot be read") from error
        peer, begun = host_of(request.getClientAddress()) or "-", self._clock.seconds()
        with self._logins.hold(peer):
            known = passwords.hash_of(name)
            with self._checks.hold(""):
                matches = await self._threads.run((known or _UNKNOWN).matches, password)
            if known is not None and matches:
                return name
            log.warn(
                "operator login refused: peer={peer} user={user}",
                peer=peer,
                user=ascii(name[:64]),
            )
            await deferLater(self._clock, max(0.0, begun + WRONG_SECONDS - self._clock.seconds()))
        raise LoginRequired("the name or the password is wrong")
