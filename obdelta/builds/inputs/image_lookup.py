"""Image references: resolves what a client names to a manifest, with the client's own credentials.

The look-up also shows that the client may have the image: it is done for every client, even where a
finished delta exists. Answers are cached for a short time, by credentials.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TypeVar

from twisted.internet.interfaces import IReactorTime

from obdelta.concurrency.single_flight import Shared
from obdelta.errors import ManifestInvalid, ObdeltaError, TooManyRequests, UpstreamBusy
from obdelta.oci import ImageConfig, Index, Manifest, Reference
from obdelta.registry import Credentials, Upstream

KEEP_TAG = 10.0
KEEP_DIGEST = 120.0
"""Seconds that an answer is cached: a tag may move, a digest can only be deleted."""
_KEPT = 512
MAX_NESTED = 4
"""Nesting depth of indexes that is followed."""
_Key = tuple[Credentials, str, str]
_T = TypeVar("_T")


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
        """Returns the image's verified config. Raises ManifestInvalid too unless it has one diff_id
        for each layer.
        """
        config = await upstream.config(self.repository, self.manifest.config, credentials)
        if len(config.diff_ids) != len(self.manifest.layers):
            raise ManifestInvalid(
                f"image {self.repository}",
                f"{len(self.manifest.layers)} layers, but {len(config.diff_ids)} diff_ids",
            )
        return config


class ImageLookup:
    """Resolves references in the upstream; simultaneous clients of the same image share one
    request.
    """

    def __init__(self, upstream: Upstream, clock: IReactorTime) -> None:
        self._upstream, self._clock = upstream, clock
        self._kept: OrderedDict[_Key, tuple[float, ResolvedImage]] = OrderedDict()
        self._refused: OrderedDict[_Key, tuple[float, ObdeltaError]] = OrderedDict()
        self._asking: Shared[_Key, ResolvedImage] = Shared()

    async def resolve(self, reference: Reference, credentials: Credentials) -> ResolvedImage:
        """Returns the image. Raises what :meth:`Upstream.manifest` raises, and SeveralPlatforms."""
        key = (credentials, reference.repository, reference.selector)
        kept = self._kept.get(key)
        if kept is not None and kept[0] > self._clock.seconds():
            return kept[1]
        refused = self._refused.get(key)
        if refused is not None and refused[0] > self._clock.seconds():
            raise refused[1].with_traceback(None)
        return await self._asking.do(key, lambda: self._ask(key, reference, credentials))

    async def _ask(
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
            self._refused[key] = (self._clock.seconds() + _keep(reference), error)
            _bound(self._refused)
            raise
        image = ResolvedImage(reference.repository, replace(found, raw=b""))
        self._kept[key] = (self._clock.seconds() + _keep(reference), image)
        _bound(self._kept)
        return image


def _keep(reference: Reference) -> float:
    return KEEP_DIGEST if reference.digest is not None else KEEP_TAG


def _bound(kept: OrderedDict[_Key, _T]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
