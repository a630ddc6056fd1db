"""The report of a delta image: which layers and files made it large. Read from
``DeltaRow.details``.

It describes v3 deltas. Pure code: ``obdelta explain`` and operators' pages display it. Field names
are those of the JSON (docs/commands.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from obdelta.delta.reports import entry_changes
from obdelta.json_records import known_fields

MB = 1_000_000
MAX_ADVICE = 10
MIN_RETIMED = 20
"""Advice is given from this number of entries with new times in a layer."""
MIN_LAYER = 10_240
"""Advice is given for unchanged layers of this size and more: the smallest tar of most writers."""
MIN_CODE = 100_000
"""Advice is given if a recompiled file takes this many bytes of the delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the target and its costs, with the fields of ``layer_report.Share``."""

    literal_bytes: int
    copied_bytes: int
    copies: int
    small_copies: int
    wire_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart(Part):
    """An entry of the tar of target layer ``layer`` (counted from 1).

    ``change`` says what kind of change it is, and ``archive`` the format of an archive
    (:mod:`obdelta.delta.reports.entry_changes`); "" if it was not recorded. ``saved`` are about
    the bytes that its advice would save.
    """

    layer: int
    name: str
    size: int
    change: str = ""
    archive: str = ""
    saved: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPart(Part):
    """One layer of the target that is not shared: ``number`` from 1, bottom to top; ``size`` of its
    uncompressed tar.

    ``wire_bytes`` is exact here: the delta layer's blob. ``rest`` are the costs outside ``files``;
    both are empty for a layer that is in the base unchanged. All but ``wire_bytes`` is 0 if it
    was not recorded (built by another builder, or by an old version). Only the times of
    ``retimed`` entries changed; they take about ``retimed_bytes``.
    """

    number: int
    diff_id: str
    size: int
    entries: int
    changed: int
    files: tuple[FilePart, ...]
    rest: Part | None
    retimed: int = 0
    retimed_bytes: int = 0

    @property
    def unchanged(self) -> bool:
        """Whether all of it is in the base: it is sent because a layer below it changed."""
        return self.size > 0 and not self.literal_bytes

    @property
    def copies_per_mb(self) -> float:
        """Copies for each 1,000,000 bytes of the layer: the cost of applying it on a device."""
        return _per_mb(self.copies, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A way to make the next delta smaller: ``text`` for people, and about how many bytes of this
    one it would have saved. ``layer`` is counted from 1.
    """

    text: str
    layer: int
    saved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaReport:
    """A v3 delta. ``shared_layers`` are the leading layers that base and target share: they cost
    nothing.

    ``disk_bytes`` is the approximate space that the target's other layers take on the device; the
    engine applies a delta while it downloads it, so the download itself takes none. ``files`` are
    the most expensive ones of all layers by ``wire_bytes``.
    """

    full_bytes: int
    delta_bytes: int
    literal_bytes: int
    copied_bytes: int
    copies: int
    small_copies: int
    disk_bytes: int
    shared_layers: int
    layers: tuple[LayerPart, ...]
    files: tuple[FilePart, ...]

    @property
    def saving(self) -> float:
        """The share of the full pull that is saved."""
        return 1 - self.delta_bytes / self.full_bytes if self.full_bytes else 0.0

    @property
    def copies_per_mb(self) -> float:
        """Copies for each 1,000,000 bytes of the layers that are built."""
        return _per_mb(self.copies, self.disk_bytes)

    def advice(self) -> list[Advice]:
        """Returns what would make the next delta smaller, the most bytes first."""
        found = [advice for file in self.files if (advice := _advice_of(file)) is not None]
        for below, layer in zip((None, *self.layers), self.layers, strict=False):
            if layer.retimed >= MIN_RETIMED:
                text = (
                    f"set SOURCE_DATE_EPOCH: only the times of {layer.retimed:,} entries of layer"
                    f" {layer.number} changed"
                )
                found.append(Advice(text=text, layer=layer.number, saved=layer.retimed_bytes))
            if below is not None and layer.unchanged and layer.size >= MIN_LAYER:
                text = (
                    f"layer {layer.number} is sent again because layer {below.number} below it"
                    f" changed: put it lower ({layer.size:,} bytes of a device's disk)"
                )
                found.append(Advice(text=text, layer=layer.number, saved=layer.wire_bytes))
        return sorted(found, key=lambda advice: -advice.saved)[:MAX_ADVICE]

    def as_json(self) -> dict[str, Any]:
        """Returns the whole report as in docs/commands.md."""
        value = asdict(self) | {
            "saving": self.saving,
            "copies_per_mb": self.copies_per_mb,
            "advice": [asdict(advice) for advice in self.advice()],
        }
        for shown, layer in zip(value["layers"], self.layers, strict=True):
            shown["copies_per_mb"] = layer.copies_per_mb
        return value


def report_from_json(value: Mapping[str, Any]) -> DeltaReport:
    """Parses the result of :meth:`DeltaReport.as_json` and ignores unknown fields. Raises KeyError
    or TypeError if it is no report.
    """
    return DeltaReport(
        **known_fields(DeltaReport, value)
        | {
            "layers": tuple(
                LayerPart(
                    **known_fields(LayerPart, {"retimed": 0, "retimed_bytes": 0} | dict(layer))
                    | {
                        "files": _files(layer["files"]),
                        "rest": _part(layer["rest"]),
                    }
                )
                for layer in value["layers"]
            ),
            "files": _files(value["files"]),
        }
    )


def _files(values: Sequence[Mapping[str, Any]]) -> tuple[FilePart, ...]:
    unknown = {"change": "", "archive": "", "saved": 0}  # of a server before these fields
    return tuple(FilePart(**known_fields(FilePart, unknown | dict(value))) for value in values)


def _part(value: Mapping[str, Any] | None) -> Part | None:
    return Part(**known_fields(Part, value)) if value is not None else None


def report(
    details: Mapping[str, Any], full_bytes: int, delta_bytes: int, top: int = 20
) -> DeltaReport:
    """Returns the report of a v3 delta from its row's ``details``, with at most ``top`` files."""
    shared = int(details.get("common", 0))
    layers = tuple(
        _layer(value, number) for number, value in enumerate(details.get("layers", ()), shared + 1)
    )
    files = sorted(
        (file for layer in layers for file in layer.files), key=lambda file: -file.wire_bytes
    )
    return DeltaReport(
        full_bytes=full_bytes,
        delta_bytes=delta_bytes,
        literal_bytes=sum(layer.literal_bytes for layer in layers),
        copied_bytes=sum(layer.copied_bytes for layer in layers),
        copies=sum(layer.copies for layer in layers),
        small_copies=sum(layer.small_copies for layer in layers),
        disk_bytes=sum(layer.size for layer in layers),
        shared_layers=shared,
        layers=layers,
        files=tuple(files[:top]),
    )


def _layer(value: Mapping[str, Any], number: int) -> LayerPart:
    explained = value.get("explained") or {}
    rest = explained.get("rest")
    literal_bytes, copied_bytes = value.get("literal_bytes", 0), value.get("copied_bytes", 0)
    return LayerPart(
        number=number,
        diff_id=value["target"],
        size=literal_bytes + copied_bytes,
        literal_bytes=literal_bytes,
        copied_bytes=copied_bytes,
        copies=value.get("copies", 0),
        small_copies=value.get("small_copies", 0),
        wire_bytes=value["size"],
        entries=explained.get("entries", 0),
        changed=explained.get("changed", 0),
        files=tuple(FilePart(layer=number, **file) for file in explained.get("top", ())),
        rest=Part(**rest) if rest else None,
        retimed=explained.get("retimed", 0),
        retimed_bytes=explained.get("retimed_bytes", 0),
    )


def verdict(file: FilePart) -> str:
    """Returns a file's verdict as text: ``jar archive``, ``timestamps only``."""
    return f"{file.archive} archive" if file.archive else _VERDICTS.get(file.change, file.change)


def _advice_of(file: FilePart) -> Advice | None:
    make = _ADVICE.get(file.change)
    if make is None or (file.change == entry_changes.RECOMPILED and file.wire_bytes < MIN_CODE):
        return None
    return Advice(text=make(file), layer=file.layer, saved=file.saved)


def _of_archive(file: FilePart) -> str:
    if file.archive == "squashfs":
        return f"unpack {file.name}, or make it without compression (-noI -noD -noF)"
    return (
        f"store {file.name} uncompressed, or unpack it: a small change inside makes the rest of a"
        f" {file.archive} archive other bytes"
    )


def _per_mb(copies: int, size: int) -> float:
    return copies * MB / size if size else 0.0


_VERDICTS: Mapping[str, str] = {
    entry_changes.TIMES: "timestamps only",
    entry_changes.METADATA: "owner, mode or other attributes only",
    entry_changes.MOVED: "moved or renamed",
    entry_changes.MEDIA: "compressed media",
    entry_changes.RANDOM: "encrypted or random",
}
_ADVICE: Mapping[str, Callable[[FilePart], str]] = {
    entry_changes.ARCHIVE: _of_archive,
    entry_changes.RANDOM: lambda file: (
        f"keep {file.name} out of the image if it changes with each release: it is encrypted or"
        " random, and no delta makes it smaller"
    ),
    entry_changes.RECOMPILED: lambda file: (
        f"build {file.name} reproducibly (same compiler, paths and build ID): it was recompiled"
    ),
}
