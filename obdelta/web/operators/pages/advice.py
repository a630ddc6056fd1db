"""Advice for operators: how to remedy a failed build, derived from its recorded reason."""

from __future__ import annotations

from obdelta.store.catalogue.records import FailureRow, Outcome

_REFUSED = "The registry refused the credentials: check upstream-credentials and builder-token."
_TIME = "Raise build-timeout, or set effort to fast."
_WORK = (
    "Nothing to do if only this image is concerned: its contents take far longer "
    "than others of its size, and devices pull in full. If it happens to ordinary "
    "images, the machine or its disk is too slow for its load."
)
_MEMORY = "Raise worker-memory, or set max-builds lower so that each worker has more."
_KILLED = (
    "Most likely the kernel killed it because memory ran out (see dmesg): lower "
    "max-builds or worker-memory."
)
_PUSH = "The image in the registry is damaged, or not what its manifest says: push it again."
_BY_REASON = (
    (
        "upstream registry:",
        "Check whether the registry can be reached from here (/readyz). The next "
        "request starts a new build.",
    ),
    ("unauthorized:", _REFUSED),
    ("denied:", _REFUSED),
    (
        "store:",
        "Free space on the disk of state-dir, or lower store-quota so that old deltas "
        "are evicted earlier.",
    ),
    ("build worker: out of memory", _MEMORY),
    ("build worker: the job took", _WORK),
    ("build worker: rsync was stopped: it", _WORK),
    ("build worker: the build took", _TIME),
    ("build worker: it was ended by signal", _KILLED),
    (
        "build worker:",
        "See the log. If it happens again, please report it with the names of both images.",
    ),
    ("layer ", _PUSH),
    ("inflated layer", _PUSH),
    ("blob ", _PUSH),
    ("manifest ", _PUSH),
    ("repository ", "The repository is gone from the registry."),
)


def advice(failure: FailureRow) -> str:
    """Returns one or two sentences that tell an operator how to remedy a failure."""
    if failure.outcome is Outcome.PROOF_FAILED:
        return (
            "A finished delta did not lead to its target and was discarded: bad memory, a "
            "bad disk, or a defect. Devices pull in full. Please report it with the names "
            "of both images."
        )
    if failure.outcome is Outcome.TOO_LARGE:
        return (
            "Nothing to do: the images have little in common, and devices pull the target in full"
            " (setting max-delta-ratio)."
        )
    if failure.outcome is Outcome.UNUSABLE and failure.reason.startswith("no delta can start"):
        return "Nothing to do: devices pull the target in full, and get deltas from there on."
    for start, what in _BY_REASON:
        if failure.reason.startswith(start):
            return what
    return "See the log at this time. The next request starts a new build."
