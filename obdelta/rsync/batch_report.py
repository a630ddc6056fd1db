"""What made a batch big, told from what its build recorded (``DeltaRow.details["shares"]`` of a v2
delta).

Pure: shown by ``obdelta explain`` and on operators' pages. The fields' names are those of the JSON
(docs/commands.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from obdelta.json_records import known_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Files whose content is sent: their ``size``, ``wire_bytes`` in the batch (exact),
    ``copied_bytes`` of the base's files with the same names, in ``copies`` runs.
    """

    size: int
    wire_bytes: int
    copied_bytes: int
    copies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFile(Files):
    """One of them. ``name`` is text that may be shown anywhere (:func:`obdelta.oci.shown`)."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport(Files):
    """A v2 delta. ``head``: bytes before the records, nearly all of them the list of all the
    target's files; ``files`` are sent, ``top`` has the largest in the batch.
    """

    full_bytes: int
    delta_bytes: int
    head: int
    files: int
    top: tuple[SentFile, ...]

    @property
    def saving(self) -> float:
        """The share of the full pull that is not sent."""
        return 1 - self.delta_bytes / self.full_bytes if self.full_bytes else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it, as docs/commands.md has it."""
        return asdict(self) | {"saving": self.saving}


def batch_report(
    details: Mapping[str, Any], full_bytes: int, delta_bytes: int
) -> BatchReport | None:
    """None where it was not recorded."""
    shares = details.get("shares")
    return (
        batch_report_from_json({**shares, "full_bytes": full_bytes, "delta_bytes": delta_bytes})
        if shares
        else None
    )


def batch_report_from_json(value: Mapping[str, Any]) -> BatchReport:
    """What :meth:`BatchReport.as_json` wrote; what else there is in it is passed over. KeyError,
    TypeError: it is none.
    """
    return BatchReport(
        **known_fields(BatchReport, value)
        | {"top": tuple(SentFile(**known_fields(SentFile, file)) for file in value["top"])}
    )
