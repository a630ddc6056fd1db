"""The rule of pruning: which deltas no device can ask for any more. No input or output: tests need
no API.

Deltas of unknown images are kept. A token of the API may see less than there is, so absence alone
proves nothing: an image counts as gone only if the API has named it once, its fleet can still be
seen, and the image is in no release of it.
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
    """Facts about an image, from the API. ``visible``: it has named the image once, and the image's
    fleet can be seen now. ``exists``: it is in a release. ``held``: a device has it, or is to have
    it. ``tracked``: devices of its fleet report what they have, and some can be seen.
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
