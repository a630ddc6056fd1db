"""Image references: parses and checks ``host/repository[:tag][@digest]``.

Source: distribution's ``reference`` grammar. Devices send unescaped text, so everything is checked
here, once. An existing :class:`Reference` is safe to put into a URL path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from obdelta.errors import BadDigest, BadReference
from obdelta.oci.digest import Digest

_MAX_REFERENCE = 1024
_MAX_REPOSITORY = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = re.compile(
    rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]{{2,45}}\])(?::[0-9]{{1,5}})?", re.ASCII
)


def is_repository(text: str) -> bool:
    """Returns whether the text is a repository name (``v2/<32 hex>``, ``org/app/name``, …)."""
    return len(text) <= _MAX_REPOSITORY and _REPOSITORY.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    return _TAG.fullmatch(text) is not None


def is_host(text: str) -> bool:
    """Returns whether the text is ``host`` or ``host:port``."""
    return len(text) <= 255 and _HOST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Reference:
    """One image name. ``host`` is in lower case with its port if any, and ``""`` if the text has
    none.
    """

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parses a reference. Raises BadReference. The first component is a host by Docker's rule:
        it has a dot or a colon, or is ``localhost``.
        """
        if not text:
            raise BadReference(text, "it is empty")
        if len(text) > _MAX_REFERENCE:
            raise BadReference(text, f"it is longer than {_MAX_REFERENCE} characters")
        rest, at, digest_text = text.partition("@")
        digest: Digest | None = None
        if at:
            try:
                digest = Digest.parse(digest_text)
            except BadDigest as error:
                raise BadReference(text, "what follows @ is not sha256:<64 hex>") from error
        host = ""
        first, slash, path = rest.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            if not is_host(first):
                raise BadReference(text, "bad host")
            host, rest = first.lower(), path
        repository, colon, tag = rest.partition(":")
        if colon and not is_tag(tag):
            raise BadReference(text, "bad tag")
        if not is_repository(repository):
            raise BadReference(text, "bad repository name")
        return cls(host, repository, tag if colon else None, digest)

    @property
    def selector(self) -> str:
        """Returns the name that selects a manifest in the registry: the digest, else the tag, else
        ``latest``.
        """
        return str(self.digest) if self.digest is not None else (self.tag or "latest")

    def with_tag(self, tag: str) -> Reference:
        """Returns the same repository with another tag."""
        return replace(self, tag=tag, digest=None)

    def __str__(self) -> str:
        return (
            (f"{self.host}/" if self.host else "")
            + self.repository
            + (f":{self.tag}" if self.tag is not None else "")
            + (f"@{self.digest}" if self.digest is not None else "")
        )
