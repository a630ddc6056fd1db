"""The rule of pruning: which deltas no device can ask for any more. Pure functions, so tests need
no API.

Deltas of unknown images are kept. A token of the API may see less than there is, so absence alone
proves nothing: an image counts as gone only if the API has listed it once, the token can still see
its fleet, and no release of the fleet has it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a delta is removed."""

    TARGET_GONE = "the release of its target is gone"
    BASE_GONE = "the release of its base is gone"
    BASE_UNUSED = "no device has its base, or is to have it"


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts about an image, from the API. ``visible``: the API has listed the image once, and the
    token can see its fleet now. ``exists``: a release has the image. ``held``: a device has the
    image, or will be updated to it. ``tracked``: devices of the fleet report their images, and the
    token can see some of them.
    """

    visible: bool = False
    exists: bool = False
    held: bool = False
    tracked: bool = False

    @property
    def gone(self) -> bool:
        """Whether it was in a release once, and is in none now."""
        return self.visible and not self.exists and not self.held


UNKNOWN = ImageFacts()


def reason_to_remove(base: ImageFacts, target: ImageFacts) -> Reason | None:
    """Returns why no device can ask for a delta, None for one that stays."""
    if target.gone:
        return Reason.TARGET_GONE
    if base.gone:
        return Reason.BASE_GONE
    if base.visible and base.tracked and not base.held:
        return Reason.BASE_UNUSED
    return None
