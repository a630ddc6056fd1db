"""Errors that obdelta raises on purpose. ``str(error)`` is one line that clients may see.

Each parameter of a constructor is a field: a worker process sends its errors by them. No text holds
a token, a signed URL or a path of this machine.
:mod:`obdelta.web.errors` maps the classes to HTTP statuses, in one table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar


class ObdeltaError(Exception):
    """The base class. ``str()`` is one line, fit for a client."""


class _Explained(ObdeltaError):
    """An error whose text is the ``subject`` of its class, and why."""

    subject: ClassVar[str]

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"{self.subject}: {why}")


def without_login(text: str) -> str:
    """Returns a URL's text without its login (``https://user:password@host``), for display."""
    return re.sub(r"//\S*@", "//…@", text)


class SettingsError(ObdeltaError):
    """A setting cannot be used. The error names the key, the given value, and what is expected."""

    def __init__(self, key: str, value: str | None, expected: str) -> None:
        self.key, self.value, self.expected = key, value, expected
        given = "is missing" if value is None else f"has the value {without_login(value)!r}"
        self.each: tuple[SettingsError, ...] = (self,)
        super().__init__(f"setting {key} {given}: expected {expected}")


class SettingsErrors(SettingsError):
    """Several settings cannot be used: ``each`` of them. The other fields are the first one's."""

    def __init__(self, errors: Sequence[SettingsError]) -> None:
        first = errors[0]
        self.key, self.value, self.expected = first.key, first.value, first.expected
        self.each = tuple(errors)
        ObdeltaError.__init__(self, "; ".join(map(str, errors)))


def joined(errors: Sequence[SettingsError]) -> SettingsError:
    """Returns one error for all of them."""
    return errors[0] if len(errors) == 1 else SettingsErrors(errors)


# -- errors of the client --------------------------------------------------------------------
class BadRequest(ObdeltaError):
    """The request cannot be understood. A retry cannot help."""


class BadReference(BadRequest):
    """An image reference that cannot be parsed."""

    def __init__(self, text: str, why: str) -> None:
        self.text, self.why = text, why
        shown = text if len(text) <= 80 else text[:77] + "..."
        super().__init__(f"bad image reference {shown!a}: {why}")


class BadDigest(BadRequest):
    """Text that should be ``sha256:<64 hex>`` and is not."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(f"bad digest {text[:80]!a}: expected sha256:<64 lower-case hex digits>")


class ForeignHost(BadRequest):
    """A reference names a host that this server does not serve (setting ``registry-hosts``)."""

    def __init__(self, host: str) -> None:
        self.host = host
        super().__init__(f"images on host {host[:80]!a} are not served here")


# -- access ----------------------------------------------------------------------------------
class Unauthorized(_Explained, ObdeltaError):
    """No valid credentials. ``challenge`` is the answer's ``WWW-Authenticate``, or None."""

    subject = "unauthorized"

    def __init__(self, why: str, challenge: str | None = None) -> None:
        self.challenge = challenge
        super().__init__(why)


class Denied(_Explained, ObdeltaError):
    """Valid credentials that do not grant this access."""

    subject = "denied"


class TooManyRequests(_Explained, ObdeltaError):
    """The client is over a limit, here or upstream. ``retry_after`` is in seconds, or None."""

    subject = "too many requests"

    def __init__(self, why: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(why)


# -- missing (never the same as broken) ------------------------------------------------------
class Missing(ObdeltaError):
    """The requested object does not exist."""


class NameUnknown(Missing):
    """The repository does not exist."""

    def __init__(self, repository: str) -> None:
        self.repository = repository
        super().__init__(f"repository {repository} is unknown")


class ManifestUnknown(Missing):
    """No such tag or manifest in the repository."""

    def __init__(self, repository: str, reference: str, there: str = "") -> None:
        """``there`` says what the repository has instead, if that is known."""
        self.repository, self.reference, self.there = repository, reference, there
        has = f": it has {there}" if there else ""
        super().__init__(f"manifest {reference} is unknown in {repository}{has}")


class BlobUnknown(Missing):
    """No such blob in the repository."""

    def __init__(self, digest: object) -> None:
        self.digest = digest
        super().__init__(f"blob {digest} is unknown")


class FormUnreadable(Missing):
    """A blob of a delta's form (``form`` is its name), for an engine that cannot read it."""

    def __init__(self, digest: object, form: str) -> None:
        self.digest, self.form = digest, form
        why = "which this engine does not read: pull the delta again by its tag"
        super().__init__(f"blob {digest} is compressed with {form}, {why}")


# -- broken ---------------------------------------------------------------------------------
class Broken(ObdeltaError):
    """Content that contradicts its own description. A retry gives the same."""


class DigestMismatch(Broken):
    """Bytes that do not hash to their digest (``of`` says what was hashed)."""

    def __init__(self, expected: object, actual: object, of: str = "content") -> None:
        self.expected, self.actual, self.of = expected, actual, of
        super().__init__(f"{of} has digest {actual}, expected {expected}")


class SizeMismatch(Broken):
    """More or fewer bytes than were declared."""

    def __init__(self, expected: int, actual: int, of: str = "content") -> None:
        self.expected, self.actual, self.of = expected, actual, of
        super().__init__(f"{of} has {actual} bytes, expected {expected}")


class ImageUnusable(Broken):
    """An image that can never be the base or target of a delta.

    Raised only for content whose digest was verified, or for which the registry gave no digest, and
    for content over a bound of this server. A retry cannot change that, so the first answer is
    already the target's own name. Content that does not match its digest is
    :class:`UpstreamUnavailable`: another attempt may bring the right bytes.
    """


class ManifestInvalid(ImageUnusable):
    """A manifest, index or image config that cannot be used."""

    def __init__(self, what: str, why: str) -> None:
        self.what, self.why = what, why
        super().__init__(f"{what} is invalid: {why}")


class LayerInvalid(ImageUnusable):
    """A layer that cannot be inflated or is not a tar."""

    def __init__(self, what: object, why: str) -> None:
        self.what, self.why = what, why
        super().__init__(f"layer {what} is invalid: {why}")


class StreamInvalid(Broken):
    """A librsync delta stream that cannot be read. ``offset``: the byte in it where it fails."""

    def __init__(self, offset: int, why: str) -> None:
        self.offset, self.why = offset, why
        super().__init__(f"delta stream is invalid at byte {offset}: {why}")


class BatchInvalid(_Explained, Broken):
    """A batch of rsync that the devices' rsync cannot read. It must never be served."""

    subject = "rsync batch"


class BaseUnusable(_Explained, ImageUnusable):
    """An image from which a device's engine can apply no delta. Its full pull works."""

    subject = "no delta can start from this base"


class ProofFailed(Broken):
    """A finished delta did not lead to its target. It must never be served."""

    def __init__(self, what: object, why: str) -> None:
        self.what, self.why = what, why
        super().__init__(f"delta for {what} failed its proof: {why}")


class CatalogueUnusable(_Explained, Broken):
    """The catalogue cannot be opened or read: it is damaged, foreign, or of a newer obdelta."""

    subject = "catalogue.sqlite in the state directory cannot be used"


# -- transient: a retry may help ------------------------------------------------------------
class Unavailable(ObdeltaError):
    """A transient fault."""


class UpstreamUnavailable(_Explained, Unavailable):
    """The upstream registry cannot be reached, hangs or answers 5xx."""

    subject = "upstream registry"


class UpstreamBusy(UpstreamUnavailable):
    """The upstream registry limits our requests. ``retry_after`` is in seconds, or None."""

    def __init__(self, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__("it limits our requests")


class ApiUnavailable(_Explained, Unavailable):
    """openBalena's API cannot be reached, hangs or answers with an error. Devices do not notice."""

    subject = "openBalena's API"


class ApiRefused(ApiUnavailable):
    """openBalena's API does not accept ``api-token``, or it does not grant what is read."""


class SharedUnavailable(_Explained, Unavailable):
    """The Redis that replicas share cannot be used now. Each replica continues by itself."""

    subject = "shared Redis"


class StillBuilding(Unavailable):
    """The delta was not ready within the time that this request may wait. The build goes on."""

    def __init__(self) -> None:
        super().__init__("the delta is still being built: retry")


class QueueFull(Unavailable):
    """The queue is full now. It never refuses for good: devices would pull in full."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        super().__init__(f"{waiting} builds are queued already: retry later")


class StoreFull(_Explained, Unavailable):
    """The disk or the quota is exhausted."""

    subject = "store"


class QuotaUsedUp(StoreFull):
    """Deltas in transfer to clients fill the whole quota. The images are not the cause."""

    def __init__(self, kept: int, quota: int) -> None:
        self.kept, self.quota = kept, quota
        super().__init__(
            f"the quota is used up: deltas served within keep-served take {kept:,} of "
            f"{quota:,} bytes: raise store-quota, or lower keep-served"
        )


class StoreFailed(_Explained, Unavailable):
    """The file system under the store failed: a directory was removed, for example."""

    subject = "store"


class StateInUse(_Explained, Unavailable):
    """Another process uses the state directory in a way that excludes this one."""

    subject = "the state directory is in use"


class WorkerFailed(_Explained, Unavailable):
    """A worker process died, was killed or ran out of time. Only its own build fails."""

    subject = "build worker"


class BuildTimedOut(WorkerFailed):
    """A build took longer than its limit. It is not tried a second time."""


class WorkTooLong(BuildTimedOut):
    """Work on layers took longer than their bytes allow. A retry would take as long."""


class ProgramUnusable(WorkerFailed):
    """A program that builds need cannot be run, whatever the images are. A retry fails, too."""


class EngineUnavailable(_Explained, Unavailable):
    """The engine that builds (setting ``builder``) cannot be reached, or is silent."""

    subject = "the balena-engine is unavailable"


class EngineFailed(_Explained, Unavailable):
    """The engine answered with an error, or with nonsense."""

    subject = "balena-engine"


class Cancelled(_Explained, Unavailable):
    """The work was cancelled (shutdown)."""

    subject = "cancelled"
