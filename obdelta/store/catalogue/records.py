"""Rows of the catalogue as values. Times are whole seconds UTC, sizes are bytes."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from obdelta.oci import DiffID, Digest, Form

Kind = Literal["v2", "v3"]
"""The kind of a delta: v2 is an rsync batch, v3 a delta image."""


@dataclass(frozen=True, slots=True)
class DeltaKey:
    """One pair of contents under one recipe, in one form. ``base`` and ``target`` are digests of
    manifests (one platform each). ``form`` is always the universal one for v2.
    """

    kind: Kind
    recipe: int
    base: Digest
    target: Digest
    form: Form = Form.UNIVERSAL


@dataclass(frozen=True, slots=True)
class DeltaRow:
    """One finished, proven delta.

    ``content`` is the digest of the delta image's manifest (v3) or of the batch (v2). ``tag`` is a
    v3 delta's tag in its target repositories, None for v2. The repositories are those it was built
    for; others may share it. ``full_bytes`` is what the device would pull without it.
    ``last_served`` is ``created`` until it is served. ``details`` is JSON: figures of each layer.
    """

    key: DeltaKey
    base_repository: str
    target_repository: str
    tag: str | None
    content: Digest
    full_bytes: int
    delta_bytes: int
    seconds: float
    created: int
    last_served: int = -1
    served: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.key.kind == "v3") != (self.tag is not None):
            raise ValueError("a v3 delta has a tag, a v2 delta has none")
        if self.last_served < 0:
            object.__setattr__(self, "last_served", self.created)


@dataclass(frozen=True, slots=True)
class Publication:
    """A delta that clients with access to two repositories can get. ``used``: when it was built or
    served last (seconds UTC); ``bytes`` are those that a device pulls.
    """

    key: DeltaKey
    base_repository: str
    target_repository: str
    bytes: int
    used: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """A delta image's manifest as it is served in one repository.

    ``base_repositories``: each was a base of it for this repository. A client that may pull one of
    them may have the manifest.
    """

    digest: Digest
    media_type: str
    raw: bytes
    base_repositories: frozenset[str]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """The result of inflating a blob. ``media_type`` is that of the blob."""

    blob: Digest
    blob_size: int
    diff_id: DiffID
    size: int
    media_type: str


class Outcome(enum.Enum):
    """Why a pair has no delta."""

    TOO_LARGE = "not worth"
    PROOF_FAILED = "proof failed"
    UNUSABLE = "unusable"
    """One of the images cannot be used for a delta; its full pull may work."""
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class FailureRow:
    """``count`` failures in a row, the last at ``last`` for ``reason`` (one line).

    The repositories are those of the last request for the pair, "" if they were not recorded.
    ``recipe`` is that of the build, 0 if it was not recorded. ``form`` is the one that failed, None
    for every form. ``work``: the key of the work that ran over its time, None if none did.
    """

    kind: Kind
    base: Digest
    target: Digest
    outcome: Outcome
    reason: str
    count: int
    last: int
    base_repository: str = ""
    target_repository: str = ""
    recipe: int = 0
    form: Form | None = None
    work: Digest | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Figures of the whole catalogue. ``blob_bytes`` counts every blob of a delta once."""

    deltas: int
    blobs: int
    blob_bytes: int
