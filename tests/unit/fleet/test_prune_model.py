"""The rule of pruning against a model of a fleet: random fleets, devices and deletions.

The model holds what devices physically have and may be told; the rule sees the API's facts only.
"""

from __future__ import annotations

import random

import pytest

from obdelta.fleet.prune_model import UNKNOWN, ImageFacts, Reason, reason_to_remove
from tests.support.pruned_fleets import Fleet, a_fleet, may_be_requested

HELD = ImageFacts(visible=True, exists=True, held=True, tracked=True)
IDLE = ImageFacts(visible=True, exists=True, held=False, tracked=True)
GONE = ImageFacts(visible=True, exists=False, held=False, tracked=True)


@pytest.mark.parametrize(
    ("base", "target", "reason"),
    [
        (HELD, HELD, None),
        (HELD, IDLE, None),
        (IDLE, HELD, Reason.BASE_UNUSED),
        (HELD, GONE, Reason.TARGET_GONE),
        (GONE, HELD, Reason.BASE_GONE),
        (GONE, GONE, Reason.TARGET_GONE),
        (UNKNOWN, HELD, None),
        (HELD, UNKNOWN, None),
        (UNKNOWN, UNKNOWN, None),
        (UNKNOWN, GONE, Reason.TARGET_GONE),
        (ImageFacts(visible=True, exists=True), HELD, None),  # a host OS, or no device in sight
        (ImageFacts(visible=False, exists=False, tracked=True), HELD, None),  # its fleet is hidden
    ],
)
def test_each_case(base: ImageFacts, target: ImageFacts, reason: Reason | None) -> None:
    assert reason_to_remove(base, target) is reason


def facts_of(fleet: Fleet, release: int, known: bool) -> ImageFacts:
    if fleet.hidden or not known:
        return UNKNOWN
    return ImageFacts(
        visible=True,
        exists=release in fleet.releases,
        held=any(release in device for device in fleet.devices),
        tracked=not fleet.host and bool(fleet.devices),
    )


def test_the_rule_removes_exactly_what_the_model_says() -> None:
    removed = sum(removed_of_a_random_world(seed) for seed in range(300))
    assert removed > 1000  # the generated fleets have something to prune


def removed_of_a_random_world(seed: int) -> int:
    chance = random.Random(seed)
    fleets = [a_fleet(chance, 100 * number) for number in range(chance.randrange(1, 5))]
    everything = [
        (fleet, release, chance.random() < 0.9)
        for fleet in fleets
        for release in sorted(fleet.releases | fleet.deleted)
    ]
    removed = 0
    for base_fleet, base, base_known in everything:
        for target_fleet, target, target_known in everything:
            reason = reason_to_remove(
                facts_of(base_fleet, base, base_known),
                facts_of(target_fleet, target, target_known),
            )
            possible = may_be_requested(fleets, base, target)
            visible = (
                (base_known and not base_fleet.hidden),
                (target_known and not target_fleet.hidden),
            )
            if possible:
                assert reason is None, f"seed {seed}: {base} → {target}"
            elif all(visible):
                assert reason is not None, f"seed {seed}: {base} → {target}"
                removed += 1
            elif not any(visible):
                assert reason is None, f"seed {seed}: nothing is known of {base} → {target}"
    return removed
