"""Resolves the two images of a request, and decides which of their errors mean a full pull."""

from __future__ import annotations

from twisted.internet.defer import ensureDeferred
from twisted.internet.interfaces import IReactorTime

from obdelta.builds.failures import NoDelta
from obdelta.builds.inputs.image_lookup import ImageLookup, ResolvedImage
from obdelta.builds.types import Builder, Pair, pair_for
from obdelta.builds.verdicts import Advice, verdict_of
from obdelta.concurrency.limits import in_time
from obdelta.errors import BadRequest, Missing, ObdeltaError, UpstreamUnavailable
from obdelta.oci import Digest, Form, Reference
from obdelta.registry import Credentials

Named = tuple[str, Digest]
"""A repository, and the digest of a manifest in it."""


class PairResolver:
    """Resolves pairs by the upstream registry. Deadlines are by ``clock``."""

    def __init__(self, lookup: ImageLookup, clock: IReactorTime) -> None:
        self._lookup, self._clock = lookup, clock

    async def resolve(
        self,
        builder: Builder,
        base: Reference,
        target: Reference,
        credentials: Credentials,
        deadline: float,
        form: Form,
    ) -> Pair:
        """Returns the pair of two images for a client that reads ``form``.

        Raises NoDelta if a full pull is the answer, and the upstream's errors otherwise.
        """
        found_target = await self._image("target", target, credentials, deadline)
        found_base = await self._image("base", base, credentials, deadline)
        if found_base.manifest.digest == found_target.manifest.digest:
            raise NoDelta("base and target are the same image", "same-image")
        return pair_for(builder, found_base, found_target, form)

    async def images(
        self,
        base: Named,
        target: Named,
        credentials: Credentials,
        deadline: float | None = None,
    ) -> tuple[ResolvedImage, ResolvedImage]:
        """Returns the images of a pair that is known already. Raises the upstream's errors."""
        found_base, found_target = [
            await self._resolved(Reference("", repository, digest=digest), credentials, deadline)
            for repository, digest in (base, target)
        ]
        return found_base, found_target

    async def _image(
        self, role: str, reference: Reference, credentials: Credentials, deadline: float
    ) -> ResolvedImage:
        try:
            return await self._resolved(reference, credentials, deadline)
        except (Missing, BadRequest) as error:
            if role == "target":
                raise
            raise NoDelta(f"base is gone: {error}", "base-gone") from error
        except ObdeltaError as error:
            verdict = verdict_of(error)
            if verdict.advice is not Advice.FULL_PULL:
                raise
            raise NoDelta(f"{role} {error}", verdict.category) from error

    async def _resolved(
        self, reference: Reference, credentials: Credentials, deadline: float | None
    ) -> ResolvedImage:
        if deadline is None:
            return await self._lookup.resolve(reference, credentials)
        return await in_time(
            ensureDeferred(self._lookup.resolve(reference, credentials)),
            deadline - self._clock.seconds(),
            self._clock,
            lambda: UpstreamUnavailable("it did not answer in time"),
        )
