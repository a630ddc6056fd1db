"""The report of a v2 delta: which files made its batch large. Read from
``DeltaRow.details["shares"]``.

Pure code: ``obdelta explain`` and operators' pages display it. Field names are those of the JSON
(docs/commands.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from obdelta.json_records import known_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Files whose content is sent. ``size`` is theirs, ``wire_bytes`` are in the batch (exact), and
    ``copied_bytes`` come from the base's files with the same names, in ``copies`` runs.
    """

    size: int
    wire_bytes: int
    copied_bytes: int
    copies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFile(Files):
    """One file that is sent. ``name`` is printable text (:func:`obdelta.oci.printable_name`)."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport(Files):
    """A v2 delta. ``head`` are the bytes before the records, nearly all of them the list of all the
    target's files. ``files`` are sent; ``top`` has the largest ones in the batch.
    """

    full_bytes: int
    delta_bytes: int
    head: int
    files: int
    top: tuple[SentFile, ...]

    @property
    def saving(self) -> float:
        """The share of the full pull that is saved."""
        return 1 - self.delta_bytes / self.full_bytes if self.full_bytes else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the whole report as in docs/commands.md."""
        return asdict(self) | {"saving": self.saving}


def batch_report(
    details: Mapping[str, Any], full_bytes: int, delta_bytes: int
) -> BatchReport | None:
    """Returns the report, or None if nothing was recorded."""
    shares = details.get("shares")
    return (
        batch_report_from_json({**shares, "full_bytes": full_bytes, "delta_bytes": delta_bytes})
        if shares
        else None
    )


def batch_report_from_json(value: Mapping[str, Any]) -> BatchReport:
    """Parses the result of :meth:`BatchReport.as_json` and ignores unknown fields. Raises KeyError
    or TypeError if it is no report.
    """
    return BatchReport(
        **known_fields(BatchReport, value)
        | {"top": tuple(SentFile(**known_fields(SentFile, file)) for file in value["top"])}
    )
