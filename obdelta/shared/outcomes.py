"""What a build led to, as replicas tell each other: a finished delta, or a verdict that saves the others the work."""

from __future__ import annotations

import json
from typing import Any

from obdelta.errors import BadDigest
from obdelta.oci import Digest
from obdelta.store.rows import DeltaKey, DeltaRow, Outcome

FORMAT = 1
"""Goes up whenever an older server would misread what a newer one writes."""


def text_of_row(row: DeltaRow) -> str:
    """JSON of a finished delta. How often it was served is each replica's own."""
    return json.dumps(
        {
            "format": FORMAT,
            "kind": row.key.kind,
            "recipe": row.key.recipe,
            "base": str(row.key.base),
            "target": str(row.key.target),
            "base_repository": row.base_repository,
            "target_repository": row.target_repository,
            "tag": row.tag,
            "content": str(row.content),
            "full_bytes": row.full_bytes,
            "delta_bytes": row.delta_bytes,
            "seconds": row.seconds,
            "created": row.created,
            "details": row.details,
        }
    )


def text_of_verdict(outcome: Outcome, reason: str) -> str:
    """JSON of why there is no delta."""
    return json.dumps({"format": FORMAT, "outcome": outcome.value, "reason": reason})


def read(text: str, key: DeltaKey) -> DeltaRow | tuple[Outcome, str] | None:
    """What another replica told of ``key``; None for what cannot be read, or is of something else."""
    try:
        found: dict[str, Any] = json.loads(text)
        if found["format"] != FORMAT:
            return None
        if "outcome" in found:
            return Outcome(found["outcome"]), str(found["reason"])
        told = DeltaKey(found["kind"], int(found["recipe"]), Digest.parse(found["base"]), Digest.parse(found["target"]))
        row = DeltaRow(
            key,
            base_repository=str(found["base_repository"]),
            target_repository=str(found["target_repository"]),
            tag=found["tag"],
            content=Digest.parse(found["content"]),
            full_bytes=int(found["full_bytes"]),
            delta_bytes=int(found["delta_bytes"]),
            seconds=float(found["seconds"]),
            created=int(found["created"]),
            details=dict(found["details"]),
        )
    except (ValueError, KeyError, TypeError, BadDigest):
        return None
    return row if told == key else None
