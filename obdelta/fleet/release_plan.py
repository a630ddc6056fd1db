"""Plans of preparation: which deltas a new release needs, the most useful first."""

from __future__ import annotations

from collections.abc import Sequence

from obdelta.fleet.releases import FleetImage, Release, Running
from obdelta.oci import Reference

Pairs = list[tuple[Reference, Reference]]


def plan(
    target: Release, running: Sequence[Running], *, devices: int, rollback: int, most: int
) -> Pairs:
    """Returns the pairs of images (base, target) for which deltas are built, at most ``most``.

    Bases are the releases that at least ``devices`` devices run, those with the most devices first.
    Every service has its pairs. For the first ``rollback`` of these releases the opposite direction
    follows, after all updates: a rollback can wait, an update begins at once.
    """
    bases = [
        one.release
        for one in sorted(running, key=lambda one: (-one.devices, -one.release.id))
        if one.devices >= devices and one.release.id != target.id
    ]
    forward = [pair for base in bases for pair in _updates(base, target)]
    back = [pair for base in bases[:rollback] for pair in _updates(target, base)]
    return list(dict.fromkeys(forward + back))[:most]


def _updates(base: Release, target: Release) -> Pairs:
    """Returns one pair of images (base, target) for each service that both releases have."""
    by_service: dict[str, FleetImage] = {image.service: image for image in base.images}
    return [
        (by_service[image.service].reference, image.reference)
        for image in target.images
        if image.service in by_service
        and by_service[image.service].reference.repository != image.reference.repository
    ]
