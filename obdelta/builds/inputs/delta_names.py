"""Finds the images of a delta by its tag or digest, for clients that name a delta as an image.

Nothing here grants access. The caller checks the repositories in an answer, or resolves them with
the client's own credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from twisted.logger import Logger

from obdelta.builds.engine.builder import ENGINE_RECIPE
from obdelta.builds.inputs.image_lookup import ImageLookup, ResolvedImage
from obdelta.builds.publish.delta_tags import delta_tag, is_delta_tag, registry_tag, tag_in
from obdelta.builds.types import Pair
from obdelta.builds.verdicts import Advice, verdict_of
from obdelta.concurrency.expiring_map import LruMap
from obdelta.delta.build import RECIPE
from obdelta.delta.image import CONFIG_LABEL
from obdelta.errors import (
    Broken,
    Missing,
    ObdeltaError,
    Unavailable,
    UpstreamBusy,
    UpstreamUnavailable,
)
from obdelta.oci import Digest, Form, Reference
from obdelta.oci.manifest import MAX_CONFIG, load_json
from obdelta.registry import Credentials, Upstream
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.catalogue.tables.refreshed_rows import NamedDelta

log = Logger()

MAX_CANDIDATES = 16
"""Base images that a tag of unknown origin is compared with."""
_KEPT = 1024
_RECIPES = (*range(RECIPE, 0, -1), ENGINE_RECIPE)


class DeltaNames:
    """Finds images in the catalogue first, then from the images themselves."""

    def __init__(
        self,
        catalogue: Catalogue,
        lookup: ImageLookup,
        upstream: Upstream,
        now: Callable[[], float],
    ) -> None:
        """``now`` gives the time of day."""
        self._catalogue, self._lookup, self._upstream = catalogue, lookup, upstream
        self._now = now
        self._targets: LruMap[Digest, Digest | None] = LruMap(_KEPT)
        """The image ID in a delta's label, by the digest of the delta's config."""

    # -- tags whose delta is not in the store

    async def record(self, tag: str, pair: Pair) -> None:
        """Records the tag, in any form, that a client receives for a pair, so that it leads to an
        image even if the delta is removed. Only logs a failed write.
        """
        base, target = pair.base, pair.target
        named = NamedDelta(
            target.repository,
            tag_in(tag),
            base.repository,
            base.manifest.digest,
            target.manifest.digest,
        )
        try:
            await self._catalogue.named_deltas.record(named, self._now())
        except Unavailable as error:
            # A full disk must not stop a device's update.
            log.warn("the name {tag} was not recorded: {reason}", tag=named.tag, reason=str(error))

    async def named(self, repository: str, tag: str) -> list[NamedDelta]:
        """Returns the deltas that this server has published under a tag."""
        return await self._catalogue.named_deltas.find(repository, tag)

    async def rediscovered(
        self, repository: str, tag: str, bases: Sequence[str], credentials: Credentials
    ) -> NamedDelta | None:
        """Returns the only pair that a tag can mean, if its base is the image of a known
        repository.

        A tag is computed from the contents of both images, so a match proves the pair, even after
        the catalogue was lost. ``bases``: repositories that the client may pull from. Bases that
        devices requested updates from are tried too.
        """
        target = await self._image(Reference("", repository), credentials)
        if target is None:
            return None
        requested = await self._catalogue.requested_updates.bases(repository, MAX_CANDIDATES)
        references = dict.fromkeys(
            [*requested, *(Reference("", base) for base in bases if base != repository)]
        )
        for reference in list(references)[:MAX_CANDIDATES]:
            base = await self._image(reference, credentials)
            if base is not None and tag in _tags(base, target):
                return NamedDelta(
                    repository, tag, base.repository, base.manifest.digest, target.manifest.digest
                )
        return None

    async def _image(self, reference: Reference, credentials: Credentials) -> ResolvedImage | None:
        try:
            return await self._lookup.resolve(reference, credentials)
        except ObdeltaError:
            return None

    # -- deltas that are named as images

    async def image_behind(
        self, reference: Reference, credentials: Credentials
    ) -> Reference | None:
        """Returns the image that a delta leads to; ``reference`` itself if it names an ordinary
        image.

        A delta is named by its tag, by the digest of its manifest, or by an image ID, its own or
        its target's. None: it is a delta with an unknown target. Raises what the look-up raises.
        """
        repository, tag, digest = reference.repository, reference.tag, reference.digest
        if digest is None and not is_delta_tag(tag):
            return reference
        if digest is None and tag is not None:
            tags = [tag_in(tag, form) for form in Form]
            row = await self._catalogue.delta_tagged(repository, *tags)
            named = [] if row is not None else await self.named(repository, tag_in(tag))
            if row is not None or named:
                return Reference(
                    "", repository, digest=row.key.target if row is not None else named[0].target
                )
        elif digest is not None:
            target = await self._catalogue.target_of(repository, digest)
            if target is not None:
                return Reference("", repository, digest=target)
        try:
            image = await self._lookup.resolve(reference, credentials)
        except Missing:
            return await self._with_image_id(repository, digest, credentials) or reference
        except UpstreamUnavailable as error:
            # Registries answer 500 if a config's digest is requested as a manifest's.
            if digest is None or isinstance(error, UpstreamBusy):
                raise
            if await self._image(Reference("", repository), credentials) is None:
                raise
            return await self._with_image_id(repository, digest, credentials)
        except ObdeltaError as error:
            if verdict_of(error).advice is Advice.FULL_PULL:
                return reference  # the build finds the same, and reports it
            raise
        target_id = await self._target_of(image, credentials)
        return (
            reference
            if target_id is None
            else await self._with_image_id(repository, target_id, credentials)
        )

    async def images_behind_id(self, image_id: Digest) -> list[Reference]:
        """Returns the images that a delta with this image ID leads to, one for each repository that
        has it.
        """
        found = await self._catalogue.targets_anywhere(image_id)
        return [Reference("", repository, digest=target) for repository, target in found]

    async def _with_image_id(
        self, repository: str, image_id: Digest | None, credentials: Credentials
    ) -> Reference | None:
        """Returns the repository's image if it has this ID: in openBalena a repository has one
        image.
        """
        image = (
            await self._image(Reference("", repository), credentials)
            if image_id is not None
            else None
        )
        if image is None or image.manifest.config.digest != image_id:
            return None
        return Reference("", repository, digest=image.manifest.digest)

    async def _target_of(self, image: ResolvedImage, credentials: Credentials) -> Digest | None:
        """Returns the image ID that a delta image leads to, from its label; None for an ordinary
        image.
        """
        config = image.manifest.config
        if config.digest in self._targets:
            return self._targets.get(config.digest)
        try:
            raw = await self._upstream.small_blob(image.repository, config, credentials, MAX_CONFIG)
            text = _labels(raw).get(CONFIG_LABEL)
        except (Missing, Broken):
            return None  # a build reports what is wrong with it
        found = None if text is None else Digest.of(text.encode("utf-8", "surrogatepass"))
        self._targets.set(config.digest, found)
        return found


def _labels(raw: bytes) -> dict[str, str]:
    config = load_json(raw, "config").get("config")
    labels = config.get("Labels") if isinstance(config, dict) else None
    return (
        {k: v for k, v in labels.items() if isinstance(v, str)} if isinstance(labels, dict) else {}
    )


def _tags(base: ResolvedImage, target: ResolvedImage) -> Iterable[str]:
    for recipe in _RECIPES:
        yield delta_tag(DeltaKey("v3", recipe, base.manifest.digest, target.manifest.digest))
    yield registry_tag(Pair("v3", RECIPE, base, target))
