"""Related images: those that share the most leading layers with an image, as candidates for its
base.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.python.failure import Failure

from obdelta.builds.inputs.image_lookup import ImageLookup, ResolvedImage
from obdelta.concurrency.tasks import first_failure, settle
from obdelta.errors import ObdeltaError
from obdelta.oci import Reference
from obdelta.registry import Credentials

AT_ONCE = 8
"""Manifests that are requested from the upstream at a time."""


async def related_images(
    lookup: ImageLookup,
    target: Reference,
    candidates: Sequence[Reference],
    credentials: Credentials,
    count: int,
) -> list[Reference]:
    """Returns at most ``count`` of ``candidates``: those that share the most bytes of leading
    layers with ``target``.

    Images of other services share the system's layers at most. If candidates are equal, the first
    one comes first. Candidates that share nothing, or are unavailable, are left out. Raises what
    resolving ``target`` raises.
    """
    wanted = await lookup.resolve(target, credentials)
    shared: dict[Reference, int] = {}
    for start in range(0, len(candidates), AT_ONCE):
        some = candidates[start : start + AT_ONCE]
        found = await settle(_found(lookup, one, credentials) for one in some)
        failure = first_failure(found)
        if failure is not None:
            failure.raiseException()
        images = [image for image in found if not isinstance(image, Failure)]
        shared |= {
            one: _shared_bytes(image, wanted)
            for one, image in zip(some, images, strict=True)
            if image is not None
        }
    closest = sorted(shared, key=lambda candidate: -shared[candidate])
    return [candidate for candidate in closest if shared[candidate]][:count]


async def _found(
    lookup: ImageLookup, reference: Reference, credentials: Credentials
) -> ResolvedImage | None:
    try:
        return await lookup.resolve(reference, credentials)
    except ObdeltaError:
        return None


def _shared_bytes(one: ResolvedImage, other: ResolvedImage) -> int:
    size = 0
    for layer, other_layer in zip(one.manifest.layers, other.manifest.layers, strict=False):
        if layer.digest != other_layer.digest:
            break
        size += layer.size
    return size
