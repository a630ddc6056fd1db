"""Releases and the devices that run them, as openBalena's API knows them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from twisted.logger import Logger

from obdelta.errors import ApiUnavailable, BadDigest, BadReference
from obdelta.fleet.api_client import ApiClient, Row, number, quoted, related, text
from obdelta.oci import Digest, ImageNames, Reference

_IMAGES = (
    "release_image($select=id;$expand=image($select=id,is_stored_at__image_location,content_hash;"
    "$expand=is_a_build_of__service($select=id,service_name)))"
)
_RELEASE = "id,commit,raw_version,is_finalized_at__date,update_timestamp"
_APPLICATION = "belongs_to__application($select=id,app_name,is_of__class,is_host)"
_FINAL = "status eq 'success' and is_invalidated eq false and is_finalized_at__date ne null"
_RUN = "is_running_on__device/any(d:d/id gt 0)"
CHUNK = 40
"""Images that one request asks for."""
_MAX_HOSTS = 100

log = Logger()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FleetImage:
    """The image of a service in a release. ``location`` is its name in the API, with the registry's
    host; ``reference`` has the digest that the API knows, and no host.
    """

    location: str
    reference: Reference
    service: str


@dataclass(frozen=True, slots=True)
class Release:
    """One release. ``finalized``: when, as the API writes it (ISO 8601, UTC); "" for a draft.
    ``updated``: when its row last changed, for example when it succeeded or stopped being a draft.
    """

    id: int
    application: int
    fleet: str
    version: str
    commit: str
    finalized: str
    updated: str
    images: tuple[FleetImage, ...]

    def names(self, image: FleetImage) -> ImageNames:
        """Returns the names of one of its images, as labels would state them."""
        return ImageNames.of(self.fleet, image.service, self.version, self.commit)

    def __str__(self) -> str:
        return f"{self.fleet} {self.version or self.commit[:12]} (release {self.id})"


@dataclass(frozen=True, slots=True)
class Running:
    """A release that devices run, and how many do."""

    release: Release
    devices: int


@dataclass(frozen=True, slots=True)
class FleetState:
    """A fleet that the token can see. ``tracked``: devices report which of its images they have.
    They do not for host operating systems and supervisors.
    """

    id: int
    name: str
    tracked: bool
    devices: int


class FleetReader:
    """Reads releases and devices. Everything raises ApiRefused, ApiUnavailable.

    Images of other registries than ``hosts`` are ignored: ours may have another image in a
    repository of the same name.
    """

    def __init__(self, api: ApiClient, hosts: Collection[str]) -> None:
        self._api, self._hosts = api, frozenset(hosts)
        self._ignored: set[str] = set()
        """Hosts that were logged."""

    def named(self, location: str) -> Reference | None:
        """Returns the image behind a location, None if it is none, or of another registry."""
        try:
            found = Reference.parse(location)
        except BadReference:
            return None
        if not found.host or found.host in self._hosts:
            return found
        if found.host not in self._ignored and len(self._ignored) < _MAX_HOSTS:
            self._ignored.add(found.host)
            log.warn(
                "images at {host} are ignored, which openBalena's API names: it is no registry of"
                " this server: if it is one, add it to registry-hosts",
                host=found.host,
            )
        return None

    async def check(self) -> None:
        """Raises ApiRefused for a token that the API does not know.

        The API treats such a request as a guest's, and shows no releases: with an expired token, it
        would look as if there were none. Guests may not read devices.
        """
        await self._api.page("device", select="id", top="1")

    async def finalized(self, since: str) -> list[Release]:
        """Returns the final, successful releases that were updated at ``since`` (ISO 8601) or
        later, the earliest update first.

        A release is often created as final long before its images are built. So what counts is the
        last update of its row: the API sets it when the release succeeds, and when a draft becomes
        final.
        """
        await self.check()
        rows = self._api.rows(
            "release",
            select=_RELEASE,
            filter=f"{_FINAL} and update_timestamp ge datetime{quoted(since)}",
            expand=f"{_APPLICATION},{_IMAGES}",
        )
        found = [self._release(row) async for row in rows]
        return sorted(found, key=lambda release: (release.updated, release.id))

    async def running(self, application: int) -> list[Running]:
        """Returns the releases that devices of a fleet run, those with the most devices first."""
        rows = self._api.rows(
            "release",
            select=_RELEASE,
            filter=f"belongs_to__application eq {application} and {_RUN}",
            expand=f"{_APPLICATION},{_IMAGES},is_running_on__device/$count",
        )
        found = [
            Running(self._release(row), number(row, "is_running_on__device")) async for row in rows
        ]
        return sorted(found, key=lambda one: (-one.devices, -one.release.id))

    async def fleets(self, applications: Collection[int]) -> dict[int, FleetState]:
        """Returns which of these fleets still exist and can be seen with the token."""
        found = {}
        wanted = sorted(applications)
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            ids = ",".join(map(str, chunk))
            async for row in self._api.rows(
                "application",
                select="id,app_name,is_of__class,is_host",
                filter=f"id in ({ids})",
                expand="owns__device/$count",
            ):
                tracked = text(row, "is_of__class") == "fleet" and row.get("is_host") is False
                state = FleetState(
                    number(row, "id"), text(row, "app_name"), tracked, number(row, "owns__device")
                )
                found[_requested(state.id, chunk)] = state
        return found

    async def existing(self, locations: Collection[str]) -> set[str]:
        """Returns which of ``locations`` are part of a release."""
        await self.check()
        return await self._images(locations, "release_image/any(i:i/id gt 0)")

    async def held(self, locations: Collection[str], since: str) -> set[str]:
        """Returns which of ``locations`` a device has, or will be updated to: the image is
        installed, or is part of a release that a device runs, is pinned to or is sent to, or that
        was finalized at ``since`` or later.
        """
        release = (
            f"r/{_RUN} or r/is_pinned_to__device/any(p:p/id gt 0)"
            " or r/should_be_running_on__application/any(a:a/id gt 0)"
            f" or r/is_finalized_at__date ge datetime{quoted(since)}"
        )
        return await self._images(
            locations,
            "(image_install/any(n:n/status ne 'deleted')"
            f" or release_image/any(i:i/is_part_of__release/any(r:{release})))",
        )

    async def _images(self, locations: Collection[str], condition: str) -> set[str]:
        found, wanted = set[str](), sorted(locations)
        for start in range(0, len(wanted), CHUNK):
            chunk = wanted[start : start + CHUNK]
            names = ",".join(map(quoted, chunk))
            async for row in self._api.rows(
                "image",
                select="id,is_stored_at__image_location",
                filter=f"is_stored_at__image_location in ({names}) and {condition}",
            ):
                found.add(_requested(text(row, "is_stored_at__image_location"), chunk))
        return found

    def _release(self, row: Row) -> Release:
        applications = related(row, "belongs_to__application")
        application: Row = applications[0] if applications else {}
        images = [self._image(one) for one in related(row, "release_image")]
        names = ImageNames.of(
            text(application, "app_name"), "", text(row, "raw_version"), text(row, "commit")
        )
        return Release(
            number(row, "id"),
            number(application, "id"),
            names.fleet,
            names.release,
            names.commit,
            text(row, "is_finalized_at__date"),
            text(row, "update_timestamp"),
            tuple(image for image in images if image is not None),
        )

    def _image(self, row: Row) -> FleetImage | None:
        """Returns an image, None for one whose location names none of our registry."""
        found = related(row, "image")
        if not found:
            return None
        image = found[0]
        location = text(image, "is_stored_at__image_location")
        if (named := self.named(location)) is None:
            return None
        try:
            digest = Digest.parse(text(image, "content_hash"))
        except BadDigest:
            digest = None
        services = related(image, "is_a_build_of__service")
        service = text(services[0], "service_name") if services else ""
        return FleetImage(location, Reference("", named.repository, None, digest), service)


def _requested(found: T, wanted: Collection[T]) -> T:
    """Returns what the API has found. Raises ApiUnavailable for what was not asked for."""
    if found not in wanted:
        raise ApiUnavailable("it answers with rows that were not asked for")
    return found


def written(when: datetime) -> str:
    """Returns a time in UTC as the API writes it."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
