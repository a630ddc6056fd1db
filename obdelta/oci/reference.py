"""Names of images: references (``host/repository[:tag][@digest]``), and paths of the registry API.

Devices send unescaped text, so everything is checked here, once. An existing :class:`Reference` is
safe to put into a URL path.
Sources: distribution's ``reference`` grammar; OCI distribution specification (paths and queries).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from obdelta.errors import BadDigest, BadReference, BadRequest
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

_PATH = re.compile(
    r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)", re.ASCII
)
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+/-]{1,255}", re.ASCII)
_LAST = re.compile(r"[ -~]{0,255}", re.ASCII)
_PARAMETERS: Mapping[str, Mapping[bytes, re.Pattern[str]]] = {
    "tags": {b"n": _NUMBER, b"last": _LAST},
    "referrers": {b"artifactType": _MEDIA_TYPE},
}
"""The query parameters of each endpoint, and their valid values. Others never reach the
upstream.
"""


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


@dataclass(frozen=True, slots=True)
class RegistryPath:
    """A parsed path under ``/v2/``. ``kind`` is ``manifests``, ``blobs``, ``tags`` or
    ``referrers``.
    """

    repository: str
    kind: str
    reference: str

    @property
    def path(self) -> str:
        """Returns the path for the upstream."""
        return f"/v2/{self.repository}/{self.kind}/{self.reference}"

    @property
    def digest(self) -> Digest | None:
        """Returns the digest of a manifest or blob, or None for a tag and for other kinds."""
        try:
            return Digest.parse(self.reference) if self.kind in ("manifests", "blobs") else None
        except BadDigest:
            return None


def proxied_query(kind: str, parameters: Mapping[bytes, Sequence[bytes]]) -> bytes:
    """Returns the query for the upstream: the endpoint's own parameters, in a fixed order. Raises
    BadRequest for invalid values.

    Other parameters would make identical requests look different.
    """
    found: list[tuple[bytes, bytes]] = []
    for name, pattern in _PARAMETERS.get(kind, {}).items():
        values = parameters.get(name, ())
        if not values:
            continue
        if len(values) > 1 or pattern.fullmatch(values[0].decode("latin-1")) is None:
            raise BadRequest(f"the parameter {name.decode()} cannot be used")
        found.append((name, values[0]))
    return urlencode(found).encode("ascii")


def parse_path(path: str) -> RegistryPath | None:
    """Returns the path's parts, or None for ``/v2/`` itself. Raises BadRequest for any
    other path.
    """
    if path in ("/v2", "/v2/"):
        return None
    if path == "/v2/_catalog":
        raise BadRequest("the catalog of all repositories is not served: ask the registry itself")
    match = _PATH.fullmatch(path)
    if match is None:
        raise BadRequest("there is nothing at this path")
    name, kind, reference = match["name"], match["kind"], match["reference"]
    if not is_repository(name):
        raise BadRequest("bad repository name")
    if kind in ("blobs", "referrers"):
        Digest.parse(reference)
    elif kind == "manifests" and not is_tag(reference):
        try:
            Digest.parse(reference)
        except BadDigest as error:
            raise BadRequest("neither a tag nor a digest") from error
    elif kind == "tags" and reference != "list":
        raise BadRequest("there is nothing at this path")
    return RegistryPath(name, kind, reference)
