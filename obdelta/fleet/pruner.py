"""Pruning: removes deltas that no device can ask for any more, from the store and the registry.

The quota bounds the store, but nothing bounds the registry. A dry run reports what would be
removed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from twisted.internet.defer import DeferredLock, ensureDeferred
from twisted.logger import Logger

from obdelta.builds.publish.batch_publisher import BATCH_TAG, is_batch
from obdelta.builds.publish.delta_tags import DELTA_TAG
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, CREATED_BY
from obdelta.errors import Missing, ObdeltaError, UpstreamUnavailable
from obdelta.fleet.prune_model import UNKNOWN, ImageFacts, Reason, reason_to_remove
from obdelta.fleet.releases import FleetReader, written
from obdelta.oci import Digest, Manifest
from obdelta.registry import Credentials, Upstream
from obdelta.registry.manifest_removal import Remover
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.evictions import Protection
from obdelta.store.catalogue.records import DeltaKey, Publication
from obdelta.store.catalogue.tables.fleet_images import KnownImage

log = Logger()

FRESH = timedelta(days=7)
"""Images of a release that was finalized within this time count as held: devices may be sent to it
at any moment.
"""
MAX_UNAVAILABLE = 5
"""Repositories in a row for which the registry gives no answer, after which no more are tried."""
_IMAGE = re.compile(r"v[0-9]+/([0-9a-f]{16})[0-9a-f]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredPrune:
    """A delta that is removed from the store."""

    key: DeltaKey
    base_repository: str
    target_repository: str
    bytes: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class RegistryPrune:
    """A delta image that is removed from the registry, with all of its tags."""

    repository: str
    digest: Digest
    tags: tuple[str, ...]
    reason: Reason


@dataclass(frozen=True, slots=True)
class RegistryProblem:
    """Why deltas of a repository stay in the registry, which might be removed."""

    repository: str
    reason: str


@dataclass(slots=True)
class Pruned:
    """The result: deltas to remove, or removed ones if ``applied``. ``kept``: the number of deltas
    that stay in the store, by reason. ``freed`` in bytes. ``problems``: of the registry's part.
    """

    applied: bool
    stored: list[StoredPrune] = field(default_factory=list)
    registry: list[RegistryPrune] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    freed: int = 0
    problems: list[RegistryProblem] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """The first problem, and how many there are more; None if there is none."""
        if not self.problems:
            return None
        more = len(self.problems) - 1
        first = f"{self.problems[0].repository}: {self.problems[0].reason}"
        return first if not more else f"{first} (and {more} more repositories)"


@dataclass(frozen=True, slots=True)
class Registry:
    """Access to the registry that deltas are pushed to."""

    upstream: Upstream
    remover: Remover
    credentials: Credentials


class Pruner:
    """Prunes, one run at a time. ``registry`` is None if deltas are not pushed. ``now`` returns
    seconds UTC.
    """

    def __init__(
        self,
        *,
        reader: FleetReader,
        catalogue: Catalogue,
        blobs: BlobStore,
        registry: Registry | None,
        keep_served: float,
        recipe: int,
        now: Callable[[], float],
    ) -> None:
        self._reader, self._catalogue, self._blobs = reader, catalogue, blobs
        self._registry, self._keep_served, self._recipe = registry, int(keep_served), recipe
        self._now, self._lock = now, DeferredLock()

    async def prune(self, apply: bool) -> Pruned:
        """Returns what no device can ask for; with ``apply`` it is removed. Raises ApiRefused,
        ApiUnavailable, Unavailable: then nothing was removed.
        """
        return await self._lock.run(lambda: ensureDeferred(self._prune(apply)))

    async def _prune(self, apply: bool) -> Pruned:
        publications = await self._catalogue.publications()
        facts = await self._facts(await self._catalogue.fleet_images.all())
        done = Pruned(apply)
        self._choose(publications, facts, done)
        if apply and done.stored:
            now = int(self._now())
            unless = Protection(
                now - self._keep_served, now - self._keep_served, self._recipe, now + 60
            )
            keys = [one.key for one in done.stored]
            done.freed = await self._catalogue.remove(keys, self._blobs, unless=unless)
        if self._registry is not None:
            await self._prune_registry(self._registry, facts, done)
        log.info(
            "pruning: applied={applied} store={stored} registry={registry} kept={kept}"
            " freed={freed} problem={problem}",
            applied=apply,
            stored=len(done.stored),
            registry=len(done.registry),
            kept=sum(done.kept.values()),
            freed=done.freed,
            problem=done.problem or "-",
        )
        return done

    async def _facts(self, known: Sequence[KnownImage]) -> dict[str, ImageFacts]:
        """Returns the facts of all images that the API has listed, by repository.

        A repository may have several images: the registry may have had another name once.
        """
        fleets = await self._reader.fleets({image.application for image in known})
        images: dict[str, list[KnownImage]] = {}
        for image in known:
            if self._reader.named(image.location) is not None:
                images.setdefault(image.repository, []).append(image)
        seen = {
            repository: each
            for repository, each in images.items()
            if all(image.application in fleets for image in each)
        }
        locations = {image.location for each in seen.values() for image in each}
        existing = await self._reader.existing(locations)
        fresh = datetime.fromtimestamp(self._now(), UTC) - FRESH
        # Last, so that what devices have is as new as can be.
        held = await self._reader.held(locations, written(fresh))
        # A token that expired meanwhile would have seen nothing, as a guest does.
        await self._reader.check()
        found = {}
        for repository, each in seen.items():
            states = [fleets[image.application] for image in each]
            found[repository] = ImageFacts(
                visible=True,
                exists=any(image.location in existing for image in each),
                held=any(image.location in held for image in each),
                tracked=all(fleet.tracked and fleet.devices > 0 for fleet in states),
            )
        return found

    # -- the store

    def _choose(
        self, publications: Sequence[Publication], facts: Mapping[str, ImageFacts], done: Pruned
    ) -> None:
        """Chooses the stored deltas that no device can request in any repository."""
        by_key: dict[DeltaKey, list[Publication]] = {}
        for publication in publications:
            by_key.setdefault(publication.key, []).append(publication)
        oldest = int(self._now()) - self._keep_served
        for key, places in by_key.items():
            reasons = [
                reason_to_remove(
                    facts.get(place.base_repository, UNKNOWN),
                    facts.get(place.target_repository, UNKNOWN),
                )
                for place in places
            ]
            first, reason = places[0], reasons[0]
            if any(one is None for one in reasons) or reason is None:
                requested = any(
                    place.base_repository in facts and place.target_repository in facts
                    for place in places
                )
                done.kept["can be asked for" if requested else "not known to the API"] += 1
            elif first.pinned:
                done.kept["pinned"] += 1
            elif first.used >= oldest:
                done.kept["new, or served within keep-served"] += 1
            else:
                done.stored.append(
                    StoredPrune(
                        key, first.base_repository, first.target_repository, first.bytes, reason
                    )
                )

    # -- the registry

    async def _prune_registry(
        self, registry: Registry, facts: Mapping[str, ImageFacts], done: Pruned
    ) -> None:
        bases: dict[str, list[ImageFacts]] = {}
        for repository, found in facts.items():
            if (match := _IMAGE.fullmatch(repository)) is not None:
                bases.setdefault(match[1], []).append(found)
        unavailable = 0
        for repository, target in facts.items():
            if unavailable == MAX_UNAVAILABLE:
                reason = "it was not tried, as the registry gave no answer for those before"
                done.problems.append(RegistryProblem(repository, reason))
                continue
            try:
                for one in await self._removable(registry, repository, target, bases):
                    if done.applied:
                        await registry.remover.delete(repository, one.digest, registry.credentials)
                    done.registry.append(one)
            except ObdeltaError as error:
                done.problems.append(RegistryProblem(repository, str(error)))
                unavailable = unavailable + 1 if isinstance(error, UpstreamUnavailable) else 0
            else:
                unavailable = 0

    async def _removable(
        self,
        registry: Registry,
        repository: str,
        target: ImageFacts,
        bases: Mapping[str, Sequence[ImageFacts]],
    ) -> list[RegistryPrune]:
        """Returns the manifests of a repository all of whose tags name deltas to remove."""
        tags = await registry.remover.tags(repository, registry.credentials)
        reasons = {tag: _reason_of_tag(tag, target, bases) for tag in tags}
        if not any(reasons.values()):
            return []
        # A deletion takes all tags of a manifest: the same images in two releases share one.
        by_digest: dict[Digest, list[str]] = {}
        for tag in tags:
            digest = await registry.remover.digest(repository, tag, registry.credentials)
            if digest is not None:
                by_digest.setdefault(digest, []).append(tag)
        found = []
        for digest, names in by_digest.items():
            each = [reasons[tag] for tag in names]
            reason = each[0]
            if reason is None or not all(each) or not await _ours(registry, repository, digest):
                continue
            found.append(RegistryPrune(repository, digest, tuple(sorted(names)), reason))
        return found


def _reason_of_tag(
    tag: str, target: ImageFacts, bases: Mapping[str, Sequence[ImageFacts]]
) -> Reason | None:
    """Returns why the delta behind a tag is removed; None if it stays, or if the tag names no
    delta.
    """
    if BATCH_TAG.fullmatch(tag) is not None:
        return reason_to_remove(UNKNOWN, target)  # it names no base
    if DELTA_TAG.fullmatch(tag) is None:
        return None
    # Without a base whose repository begins so, only the target says something.
    candidates = bases.get(tag.split("-")[1]) or [UNKNOWN]
    reasons = [reason_to_remove(base, target) for base in candidates]
    return reasons[0] if all(reasons) else None


async def _ours(registry: Registry, repository: str, digest: Digest) -> bool:
    """Returns whether a manifest is a delta image or a batch that obdelta has made."""
    upstream, credentials = registry.upstream, registry.credentials
    try:
        manifest = await upstream.manifest(repository, str(digest), credentials)
        if not isinstance(manifest, Manifest):
            return False
        if is_batch(manifest):
            return True
        config = (await upstream.config(repository, manifest.config, credentials)).value
    except Missing:
        return False
    inner, history = config.get("config"), config.get("history")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    return (
        isinstance(labels, dict)
        and BASE_LABEL in labels
        and CONFIG_LABEL in labels
        and isinstance(history, list)
        and any(isinstance(one, dict) and one.get("created_by") == CREATED_BY for one in history)
    )
