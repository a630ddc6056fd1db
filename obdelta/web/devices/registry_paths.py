"""Paths and queries of the registry API ``/v2/``, parsed (OCI distribution specification)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from obdelta.errors import BadDigest, BadRequest
from obdelta.oci import Digest
from obdelta.oci.reference import is_repository, is_tag

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
