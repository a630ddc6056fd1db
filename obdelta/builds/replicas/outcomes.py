"""Build outcomes as JSON for other replicas: a finished delta, or a verdict that saves them the
work.

This is the one place where text from Redis is read. Other programs may write there, so everything
is checked: size, encoding, shape and ranges. Text that fails a check is no outcome at all.
"""

from __future__ import annotations

import json
import re
from typing import Any

from obdelta.builds.replicas.leases import MAX_TEXT
from obdelta.errors import BadDigest
from obdelta.oci import Digest, Form
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Outcome

FORMAT = 1
"""Incremented whenever an older server would misread what a newer one writes."""
MAX_REASON = 500
"""Characters of a reason."""
_MAX_BYTES = 1 << 50
_MAX_SECONDS = 1e12
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_REPOSITORY = re.compile(r"[a-z0-9][a-z0-9._/-]{0,255}", re.ASCII)


def text_of_row(row: DeltaRow) -> str:
    """Returns a finished delta as JSON, without its build details and its serve count, which differ
    by replica.
    """
    return json.dumps(
        {
            "format": FORMAT,
            "kind": row.key.kind,
            "form": row.key.form.value,
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
            "details": {},
        }
    )


def text_of_verdict(outcome: Outcome, reason: str) -> str:
    """Returns the reason why there is no delta, as JSON."""
    return json.dumps({"format": FORMAT, "outcome": outcome.value, "reason": reason[:MAX_REASON]})


def read(text: bytes, key: DeltaKey) -> DeltaRow | tuple[Outcome, str] | None:
    """Returns another replica's report about ``key``; None for text that no replica writes, or for
    another key.
    """
    if len(text) > MAX_TEXT:
        return None
    try:
        found: dict[str, Any] = json.loads(text.decode("utf-8"), parse_constant=_refuse)
        if found["format"] != FORMAT:
            return None
        if "outcome" in found:
            return Outcome(_text(found["outcome"])), _line(_text(found["reason"]))
        written = DeltaKey(
            found["kind"],
            _whole(found["recipe"]),
            Digest.parse(found["base"]),
            Digest.parse(found["target"]),
            # Earlier versions name no form.
            Form(found.get("form", Form.UNIVERSAL.value)),
        )
        row = DeltaRow(
            key,
            base_repository=_matching(_REPOSITORY, found["base_repository"]),
            target_repository=_matching(_REPOSITORY, found["target_repository"]),
            tag=None if key.kind == "v2" else _matching(_TAG, found["tag"]),
            content=Digest.parse(found["content"]),
            full_bytes=_whole(found["full_bytes"]),
            delta_bytes=_whole(found["delta_bytes"]),
            seconds=_seconds(found["seconds"]),
            created=int(_seconds(found["created"])),
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, BadDigest):
        return None
    return row if written == key else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text is expected")
    return value


def _line(text: str) -> str:
    """Returns one line that is fit for a log and a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_REASON])


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if pattern.fullmatch(_text(value)) is None:
        raise ValueError("it does not have the form of a name")
    return str(value)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_BYTES:
        raise ValueError("a whole number within bounds is expected")
    return value


def _seconds(value: object) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= _MAX_SECONDS
    ):
        raise ValueError("a number of seconds is expected")
    return float(value)
