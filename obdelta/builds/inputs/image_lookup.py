"""Resolves the images that a client names to manifests, with the client's own credentials.

The look-up also shows that the client may have the image: it is done for every client, even if a
finished delta exists. Answers are cached for a short time, by credentials. Configs are read at the
start of a build; the names in them are kept for operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.concurrency.expiring_map import ExpiringMap
from obdelta.concurrency.tasks import SingleFlight
from obdelta.errors import (
    ManifestInvalid,
    ObdeltaError,
    TooManyRequests,
    Unavailable,
    UpstreamBusy,
)
from obdelta.oci import (
    Descriptor,
    DiffID,
    ImageConfig,
    Index,
    Manifest,
    Reference,
    image_names,
)
from obdelta.registry import Credentials, Upstream
from obdelta.store.catalogue.tables.refreshed_rows import NamedImages

if TYPE_CHECKING:
    from obdelta.builds.types import Pair

log = Logger()

KEEP_TAG = 10.0
KEEP_DIGEST = 120.0
"""Seconds that an answer is cached: a tag may move, a digest can only be deleted."""
_KEPT = 512
MAX_NESTED = 4
"""Nesting depth of indexes that is followed."""
_Key = tuple[Credentials, str, str]


class SeveralPlatforms(ObdeltaError):
    """The name stands for images of several platforms; the device's own is unknown here."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        super().__init__(f"{reference.repository} has several platforms")


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """One image of one platform in the upstream.

    ``manifest`` comes without its ``raw`` bytes. They would be up to 4 MiB for each image that is
    cached and each that waits in a queue.
    """

    repository: str
    manifest: Manifest

    async def config(self, upstream: Upstream, credentials: Credentials) -> ImageConfig:
        """Returns the image's verified config. Also raises ManifestInvalid unless the config has
        one diff_id for each layer.
        """
        config = await upstream.config(self.repository, self.manifest.config, credentials)
        if len(config.diff_ids) != len(self.manifest.layers):
            raise ManifestInvalid(
                f"image {self.repository}",
                f"{len(self.manifest.layers)} layers, but {len(config.diff_ids)} diff_ids",
            )
        return config


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """A layer of an image: the blob that the manifest names and the diff_id that the config
    promises.
    """

    repository: str
    descriptor: Descriptor
    diff_id: DiffID


def image_layers(image: ResolvedImage, config: ImageConfig) -> list[ImageLayer]:
    """Returns all layers of an image, bottom to top."""
    pairs = zip(image.manifest.layers, config.diff_ids, strict=True)
    return [ImageLayer(image.repository, descriptor, diff_id) for descriptor, diff_id in pairs]


class ImageLookup:
    """Resolves references in the upstream; simultaneous clients of the same image share one
    request. ``now`` returns seconds UTC.
    """

    def __init__(
        self,
        upstream: Upstream,
        clock: IReactorTime,
        names: NamedImages,
        now: Callable[[], float],
    ) -> None:
        self._upstream, self._names, self._now = upstream, names, now
        self._found: ExpiringMap[_Key, ResolvedImage] = ExpiringMap(_KEPT, clock.seconds)
        self._refused: ExpiringMap[_Key, ObdeltaError] = ExpiringMap(_KEPT, clock.seconds)
        self._requests: SingleFlight[_Key, ResolvedImage] = SingleFlight()

    async def resolve(self, reference: Reference, credentials: Credentials) -> ResolvedImage:
        """Returns the image. Raises what :meth:`Upstream.manifest` raises, and SeveralPlatforms."""
        key = (credentials, reference.repository, reference.selector)
        found = self._found.get(key)
        if found is not None:
            return found
        refused = self._refused.get(key)
        if refused is not None:
            raise refused.with_traceback(None)
        return await self._requests.do(key, lambda: self._request(key, reference, credentials))

    async def _request(
        self, key: _Key, reference: Reference, credentials: Credentials
    ) -> ResolvedImage:
        try:
            found = await self._upstream.manifest(
                reference.repository, reference.selector, credentials
            )
            depth = 0
            while isinstance(found, Index):
                candidates, depth = found.candidates(), depth + 1
                if not candidates:
                    raise ManifestInvalid(f"index {reference}", "it names no image")
                if len(candidates) > 1 or depth > MAX_NESTED:
                    raise SeveralPlatforms(reference)
                found = await self._upstream.manifest(
                    reference.repository, str(candidates[0].digest), credentials
                )
        except TooManyRequests as error:
            # This server is over a limit, not the device. To the device it is a transient error,
            # not a reason for a full pull.
            raise UpstreamBusy(error.retry_after) from error
        except (ManifestInvalid, SeveralPlatforms) as error:
            self._refused.set(key, error, _keep(reference))
            raise
        image = ResolvedImage(reference.repository, replace(found, raw=b""))
        self._found.set(key, image, _keep(reference))
        return image

    async def configs(
        self, pair: Pair, credentials: Credentials
    ) -> tuple[ImageConfig, ImageConfig]:
        """Returns the verified configs of base and target. Raises what
        :meth:`ResolvedImage.config` raises.
        """
        base = await pair.base.config(self._upstream, credentials)
        target = await pair.target.config(self._upstream, credentials)
        await self._record_names(pair.base, base)
        await self._record_names(pair.target, target)
        return base, target

    async def _record_names(self, image: ResolvedImage, config: ImageConfig) -> None:
        names = image_names(config.value, image.manifest.annotations)
        try:
            await self._names.record(image.manifest.digest, names, self._now())
        except Unavailable as error:
            log.warn("the names of an image were not recorded: {reason}", reason=str(error))


def _keep(reference: Reference) -> float:
    return KEEP_DIGEST if reference.digest is not None else KEEP_TAG
