"""Requests for builds and their results, as JSON in Redis.

Other programs may write to Redis, so everything that is read is checked. Neither a request nor a
result holds credentials: a worker uses its own, and requests tokens for these repositories only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from obdelta import errors
from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.replicas import outcomes
from obdelta.builds.replicas.turns import name_of_key
from obdelta.builds.types import BuildCancelled, Pair
from obdelta.builds.verdicts import FailedElsewhere
from obdelta.errors import BadDigest, ObdeltaError, Unavailable
from obdelta.oci import Digest, Form
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind, Outcome

FORMAT = 1
"""Incremented whenever workers of an earlier version would misread a request."""
MAX_REASON = 500
"""Characters of an error's text."""
_REPOSITORY = re.compile(r"[a-z0-9][a-z0-9._/-]{0,255}", re.ASCII)
_PRINTABLE = re.compile(r"[^ -~]")

_ERRORS: Final[Mapping[str, type[ObdeltaError]]] = {
    kind.__name__: kind
    for kind in (
        BuildCancelled,
        DeltaTooLarge,
        errors.BatchInvalid,
        errors.BuildTimedOut,
        errors.DigestMismatch,
        errors.ImageUnusable,
        errors.Missing,
        errors.ProgramUnusable,
        errors.ProofFailed,
        errors.SizeMismatch,
        errors.StoreFailed,
        errors.StoreFull,
        errors.StreamInvalid,
        errors.Unavailable,
        errors.WorkerFailed,
        errors.WorkTooLong,
    )
}
"""Errors that frontends receive as they are. Any other error is passed on as its base class if that
is listed, else as Unavailable: devices are not to blame for a worker's own credentials or requests.
"""


def version_of(recipes: Mapping[Kind, int], publish: str) -> str:
    """Returns the version of jobs: all that a worker must have in common with a frontend, so that
    the frontend finds the worker's deltas in the registry. ``publish`` is the setting.
    """
    built = "-".join(f"{kind}.{recipe}" for kind, recipe in sorted(recipes.items()))
    return f"{FORMAT}-{built}-{publish}"


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """A pair to build, in one form."""

    kind: Kind
    recipe: int
    base_repository: str
    base: Digest
    target_repository: str
    target: Digest
    form: Form

    @classmethod
    def of(cls, pair: Pair) -> BuildRequest:
        """Returns the request for a pair."""
        key = pair.key
        return cls(
            key.kind,
            key.recipe,
            pair.base.repository,
            key.base,
            pair.target.repository,
            key.target,
            pair.form,
        )

    @property
    def name(self) -> str:
        """The name of the work, the same for every frontend."""
        key = DeltaKey(self.kind, self.recipe, self.base, self.target, self.form)
        return name_of_key(key, self.base_repository, self.target_repository)

    def as_json(self) -> dict[str, Any]:
        """Returns the request for Redis."""
        return {
            "kind": self.kind,
            "recipe": self.recipe,
            "base_repository": self.base_repository,
            "base": str(self.base),
            "target_repository": self.target_repository,
            "target": str(self.target),
            "form": self.form.value,
        }


def read_request(found: object) -> BuildRequest | None:
    """Returns the request, or None if it is not valid."""
    try:
        if not isinstance(found, dict):
            return None
        kind: Kind = "v2" if found["kind"] == "v2" else "v3"
        recipe, form = found["recipe"], Form(found["form"])
        if kind != found["kind"] or type(recipe) is not int:
            return None
        if kind == "v2" and form is not Form.UNIVERSAL:
            return None  # a batch has one form
        return BuildRequest(
            kind,
            recipe,
            _repository(found["base_repository"]),
            Digest.parse(found["base"]),
            _repository(found["target_repository"]),
            Digest.parse(found["target"]),
            form,
        )
    except (ValueError, KeyError, TypeError, BadDigest):
        return None


def _repository(value: object) -> str:
    if not isinstance(value, str) or _REPOSITORY.fullmatch(value) is None:
        raise ValueError("a repository is expected")
    return value


def result_of_row(row: DeltaRow) -> dict[str, Any]:
    """Returns a finished delta for Redis."""
    return {"row": outcomes.text_of_row(row)}


def result_of_error(error: ObdeltaError) -> dict[str, Any]:
    """Returns why there is no delta, for Redis."""
    reason = str(error)[:MAX_REASON]
    if isinstance(error, FailedElsewhere):
        return {"outcome": error.outcome.value, "reason": reason}
    names = (kind.__name__ for kind in type(error).__mro__)
    name = next((name for name in names if name in _ERRORS), Unavailable.__name__)
    return {"error": name, "reason": reason}


def row_of_result(found: object, pair: Pair) -> DeltaRow:
    """Returns the delta that a worker has built. Raises the worker's error, or Unavailable if the
    result is not valid.
    """
    if isinstance(found, dict):
        if isinstance(text := found.get("row"), str):
            # An engine that builds instead of the native builder makes one form alone.
            for each in pair.readable:
                row = outcomes.read(text.encode(), each.key)
                if isinstance(row, DeltaRow):
                    return row
        reason = _line(found.get("reason"))
        if isinstance(found.get("error"), str):
            raise _error(_ERRORS.get(found["error"], Unavailable), reason)
        if found.get("outcome") in {outcome.value for outcome in Outcome}:
            raise FailedElsewhere(Outcome(found["outcome"]), reason)
    raise Unavailable("a worker's result cannot be read: all must run the same version")


def _error(kind: type[ObdeltaError], reason: str) -> ObdeltaError:
    """Returns an error with the worker's text. Its other fields are not in the result."""
    error = kind.__new__(kind)
    Exception.__init__(error, reason)
    return error


def _line(text: object) -> str:
    if not isinstance(text, str):
        return "no reason was given"
    return _PRINTABLE.sub("?", text[:MAX_REASON])
