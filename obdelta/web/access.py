"""Who may have what: the seam between the HTTP faces and tokens (``docs/access.md``).

A face calls :meth:`Access.authorize` before it looks anything up, so that a cached answer is refused like a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

PULL = "pull"


@dataclass(frozen=True, slots=True)
class Grant:
    """What one asker may do, from a verified token.

    ``subject`` is the token's ``sub`` (``d_<uuid>`` or a user; ``""`` where there is none: count limits by address then).
    ``actions`` maps exact repository names to what may be done there; None means everything (``auth = none``).
    ``aliases`` maps other names to the repository that the token's issuer says they stand for.
    ``expires`` is in seconds since the epoch, None for never.
    """

    subject: str = ""
    actions: Mapping[str, frozenset[str]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    expires: float | None = None

    def allows(self, repository: str, action: str = PULL) -> bool:
        """Whether the action is granted on exactly this repository; an alias is not a repository."""
        return self.actions is None or action in self.actions.get(repository, ())

    def repository(self, asked: str) -> str:
        """The repository that a name stands for: the alias's where it is one and not itself granted, else the name."""
        return asked if self.allows(asked) else self.aliases.get(asked, asked)


class Access(Protocol):
    """Decides on a request's ``Authorization`` header."""

    def authorize(self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False) -> Grant:
        """The asker's grant, when it has ``pull`` on all the repositories in ``needs`` (none: any valid token will do).

        With ``aliases`` a name in ``needs`` may be an alias; the caller must then fetch from ``grant.repository(name)``,
        never from the alias itself, which may be another repository that nobody granted.

        Raises Unauthorized (401, with its challenge) where the token is missing or invalid, Denied (403) where a valid
        one does not reach.
        """


class OpenAccess:
    """``auth = none``: everybody may pull everything. Credentials that come along are not looked at."""

    def authorize(self, authorization: bytes | None, needs: Sequence[str], *, aliases: bool = False) -> Grant:
        """A grant without bounds."""
        return Grant()
