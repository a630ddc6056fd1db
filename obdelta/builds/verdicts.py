"""Verdicts on errors: the client should pull in full, retry later, or is refused.

This is the only mapping from error classes to these three answers. DeltaService uses the verdict to
decide what to remember and how to log the error. The API decides which status to send and whether
to hold the answer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from obdelta import errors
from obdelta.builds.delta_size_limit import DeltaTooLarge, OtherFormCostsLess
from obdelta.builds.inputs.image_lookup import SeveralPlatforms
from obdelta.builds.types import BuildCancelled
from obdelta.store.catalogue.records import Outcome

FAILURE_MEMORY = 600.0
"""Seconds for which a pair whose builds failed is answered with a full pull. Then a repaired
upstream gets its deltas again.
"""


class Advice(enum.Enum):
    """Advice to a client."""

    FULL_PULL = enum.auto()
    """Pull the target in full: a retry gives the same answer."""
    RETRY = enum.auto()
    REFUSED = enum.auto()
    """The request is malformed, not allowed, or for a target that does not exist."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The meaning of an error. ``category``: the counter's name of a full pull.

    ``outcome``: what is remembered of the pair, None for nothing. ``fault``: a failure for log and
    metrics, not a normal result. ``load``: the server, or a service that it depends on, is
    overloaded; it says nothing about the images.
    """

    advice: Advice
    category: str = ""
    outcome: Outcome | None = None
    fault: bool = True
    load: bool = False


class FailedElsewhere(errors.ObdeltaError):
    """Another replica has found that the pair has no delta.

    The verdict holds for as long as its key in Redis, and is stored nowhere else.
    """

    def __init__(self, outcome: Outcome, reason: str) -> None:
        self.outcome, self.reason = outcome, reason
        super().__init__(reason)


CATEGORY = {
    Outcome.TOO_LARGE: "not-worth",
    Outcome.PROOF_FAILED: "proof-failed",
    Outcome.UNUSABLE: "image-unusable",
    Outcome.ERROR: "build-failed",
}
"""The counter's name for what is remembered of a pair."""

_TOO_LARGE = Verdict(Advice.FULL_PULL, CATEGORY[Outcome.TOO_LARGE], Outcome.TOO_LARGE, fault=False)
_UNPROVEN = Verdict(Advice.FULL_PULL, CATEGORY[Outcome.PROOF_FAILED], Outcome.PROOF_FAILED)
_UNUSABLE = Verdict(Advice.FULL_PULL, CATEGORY[Outcome.UNUSABLE], Outcome.UNUSABLE, fault=False)
_CANCELLED = Verdict(Advice.FULL_PULL, CATEGORY[Outcome.ERROR], Outcome.ERROR, fault=False)
_REFUSED = Verdict(Advice.REFUSED)
_PASSING = Verdict(Advice.RETRY, outcome=Outcome.ERROR)
_SERVER_FAULT = Verdict(Advice.RETRY)
_LOAD = Verdict(Advice.RETRY, load=True)

# The first class that fits counts.
_TABLE: tuple[tuple[type[errors.ObdeltaError], Verdict], ...] = (
    (DeltaTooLarge, _TOO_LARGE),
    (OtherFormCostsLess, _TOO_LARGE),
    (BuildCancelled, _CANCELLED),
    (
        SeveralPlatforms,
        Verdict(Advice.FULL_PULL, "several-platforms", Outcome.UNUSABLE, fault=False),
    ),
    (errors.ProofFailed, _UNPROVEN),
    (errors.BatchInvalid, _UNPROVEN),
    (errors.StreamInvalid, _UNPROVEN),
    (errors.ImageUnusable, _UNUSABLE),
    (errors.CatalogueUnusable, _SERVER_FAULT),
    # The upstream sent other bytes than those requested: its own fault, not the image's.
    (errors.Broken, _PASSING),
    # While building. A missing base or target is found before that.
    (errors.Missing, Verdict(Advice.FULL_PULL, "layer-gone", Outcome.ERROR)),
    (errors.BadRequest, _REFUSED),
    (errors.Unauthorized, _REFUSED),
    (errors.Denied, _REFUSED),
    (errors.TooManyRequests, _LOAD),
    (errors.UpstreamBusy, _LOAD),
    (errors.QueueFull, _LOAD),
    (errors.EngineUnavailable, _LOAD),
    (errors.QuotaUsedUp, _LOAD),
    (errors.StoreFailed, _LOAD),
    (errors.StoreFull, Verdict(Advice.RETRY, outcome=Outcome.ERROR, load=True)),
    (errors.StillBuilding, _SERVER_FAULT),
    (errors.ProgramUnusable, _SERVER_FAULT),
    (errors.Cancelled, _SERVER_FAULT),
    (errors.Unavailable, _PASSING),
)


def verdict_of(error: BaseException | None) -> Verdict:
    """Returns the verdict for an error of a build or a look-up."""
    if isinstance(error, FailedElsewhere):
        return Verdict(Advice.FULL_PULL, CATEGORY[error.outcome], error.outcome, fault=False)
    return next((verdict for kind, verdict in _TABLE if isinstance(error, kind)), _REFUSED)
