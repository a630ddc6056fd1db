"""Removes manifests from the registry: lists a repository's tags, and deletes by digest.

Source: OCI distribution specification 1.1, "Listing Tags" and "Deleting manifests". A deletion by
digest takes every tag of that manifest with it, so the caller looks at all of them before.
"""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

from twisted.web.http_headers import Headers

from obdelta.errors import BadDigest, Denied, ManifestUnknown, NameUnknown, UpstreamUnavailable
from obdelta.oci import Digest
from obdelta.oci.reference import is_tag
from obdelta.registry.auth.credentials import Credentials
from obdelta.registry.auth.tokens import scope_of
from obdelta.registry.requests import Session, error_of

PAGE = 1000
MAX_TAGS, MAX_PAGES = 100_000, 1000
"""Tags of a repository, and pages of their list; some registries send fewer than ``PAGE`` a page.
"""
_MAX_BODY = 8 << 20
_NEXT = re.compile(r"""<([^>]+)>\s*;\s*rel="?next"?""", re.ASCII)
_TYPES = (
    b"application/vnd.oci.image.manifest.v1+json",
    b"application/vnd.docker.distribution.manifest.v2+json",
    b"application/vnd.oci.image.index.v1+json",
    b"application/vnd.docker.distribution.manifest.list.v2+json",
)


class Remover:
    """Removes over a session. Raises the errors of :class:`obdelta.registry.upstream.Upstream`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def tags(self, repository: str, credentials: Credentials) -> list[str]:
        """Returns all tags of a repository; none for one that does not exist."""
        path, found = f"/v2/{repository}/tags/list?n={PAGE}", dict[str, None]()
        for _ in range(MAX_PAGES):
            answer = await self._session.send(b"GET", path, Headers(), credentials, repository)
            if answer.response.status == 404:
                await answer.response.discard()
                return [*found]
            if answer.response.status != 200:
                raise await error_of(answer, repository, NameUnknown(repository))
            link = _NEXT.search(answer.response.header(b"link") or "")
            known = len(found)
            found |= dict.fromkeys(
                _tags(await answer.response.content(_MAX_BODY), answer.response.host)
            )
            if not link:
                return [*found]
            if len(found) > MAX_TAGS:
                raise UpstreamUnavailable(f"{repository} has more than {MAX_TAGS} tags")
            if len(found) == known:
                raise UpstreamUnavailable(f"the list of tags of {repository} does not end")
            path = _path(repository, link[1])
        raise UpstreamUnavailable(f"the tags of {repository} have more than {MAX_PAGES} pages")

    async def digest(self, repository: str, tag: str, credentials: Credentials) -> Digest | None:
        """Returns the digest of the manifest behind a tag, None if there is none."""
        answer = await self._session.send(
            b"HEAD",
            f"/v2/{repository}/manifests/{tag}",
            Headers({b"accept": list(_TYPES)}),
            credentials,
            repository,
        )
        if answer.response.status == 404:
            await answer.response.discard()
            return None
        if answer.response.status != 200:
            raise await error_of(answer, repository, ManifestUnknown(repository, tag))
        await answer.response.discard()
        try:
            return Digest.parse(answer.response.header(b"docker-content-digest") or "")
        except BadDigest as error:
            raise UpstreamUnavailable(
                f"{answer.response.host} does not say which manifest {tag} is"
            ) from error

    async def delete(self, repository: str, digest: Digest, credentials: Credentials) -> None:
        """Deletes a manifest, and with it all of its tags. Raises Denied with what to change."""
        answer = await self._session.send(
            b"DELETE",
            f"/v2/{repository}/manifests/{digest}",
            Headers(),
            credentials,
            repository,
            scope=scope_of(repository, delete=True),
        )
        status = answer.response.status
        if status in (200, 202, 404):
            await answer.response.discard()
            return
        if status == 405:
            await answer.response.discard()
            raise Denied(
                f"{answer.response.host} deletes nothing: enable deletion there"
                " (REGISTRY_STORAGE_DELETE_ENABLED=true)"
            )
        raise await error_of(answer, repository, ManifestUnknown(repository, str(digest)))


def _tags(body: bytes | None, host: str) -> list[str]:
    try:
        found = json.loads(body or b"")["tags"] or []
        tags = [tag for tag in found if isinstance(tag, str)]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UpstreamUnavailable(f"{host} sent no list of tags") from error
    return [tag for tag in tags if is_tag(tag)]


def _path(repository: str, link: str) -> str:
    """Returns path and query of the next page, for use at our own base URL."""
    parts = urlsplit(link)
    fit = link.isascii() and link.isprintable() and " " not in link
    if not fit or parts.path != f"/v2/{repository}/tags/list" or not parts.query:
        raise UpstreamUnavailable(f"the list of tags of {repository} continues elsewhere")
    return f"{parts.path}?{parts.query}"
