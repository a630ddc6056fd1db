"""From the references that an client names to the manifests that are meant.

Looking a reference up with the client's own credentials is also what shows that the client may have
the image: it is done for every client, also where a finished delta is at hand. Answers are kept for
a short time, by credentials.
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
"""Seconds that an answer is kept: a tag may move, a digest only be deleted."""
_KEPT = 512
MAX_NESTED = 4
"""Indexes within indexes that are followed."""
_Key = tuple[Credentials, str, str]
_T = TypeVar("_T")


class SeveralPlatforms(ObdeltaError):
    """The name stands for images of several platforms; which one the device runs is not known here."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        super().__init__(f"{reference.repository} has several platforms")


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """One image of one platform in the upstream.

    ``manifest`` comes without its ``raw`` bytes: up to 4 MiB of them, times all that are kept and
    all that wait in a queue.
    """

    repository: str
    manifest: Manifest

    async def config(self, upstream: Upstream, credentials: Credentials) -> ImageConfig:
        """Its config, verified. Raises ManifestInvalid too where it does not have a diff_id for
        each layer.
        """
        config = await upstream.config(self.repository, self.manifest.config, credentials)
        if len(config.diff_ids) != len(self.manifest.layers):
            raise ManifestInvalid(
                f"image {self.repository}",
                f"{len(self.manifest.layers)} layers, but {len(config.diff_ids)} diff_ids",
            )
        return config


class ImageLookup:
    """Resolves references in the upstream; clients of the same thing at the same time share one
    request.
    """

    def __init__(self, upstream: Upstream, clock: IReactorTime) -> None:
        self._upstream, self._clock = upstream, clock
        self._kept: OrderedDict[_Key, tuple[float, ResolvedImage]] = OrderedDict()
        self._refused: OrderedDict[_Key, tuple[float, ObdeltaError]] = OrderedDict()
        self._asking: Shared[_Key, ResolvedImage] = Shared()

    async def resolve(self, reference: Reference, credentials: Credentials) -> ResolvedImage:
        """Raises what :meth:`Upstream.manifest` raises, and SeveralPlatforms."""
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
            # The device is not over a limit, we are: to it this is a passing trouble, not a reason
            # to pull in full.
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
