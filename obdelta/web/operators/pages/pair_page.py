"""The page of one delta: why it is as large as it is, and its costs for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twisted.web.template import Tag, tags

from obdelta.builds.build_metrics import stage_seconds
from obdelta.delta.reports.image_report import (
    DeltaReport,
    FilePart,
    LayerPart,
    report,
    verdict,
)
from obdelta.oci import Digest, ImageNames
from obdelta.rsync.batch_report import BatchReport, batch_report
from obdelta.store.catalogue.records import DeltaRow
from obdelta.web.operators.deltas_api import NO_NAMES
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import (
    Piece,
    cards,
    empty,
    kind_of,
    moment,
    name,
    path,
    section,
    short,
    table,
)
from obdelta.web.operators.pages.plot import share_bar
from obdelta.web.operators.pages.treemap import treemap

_ORDER = ("fetch", "index", "match", "deflate", "record", "prove")


def content(
    row: DeltaRow,
    now: float,
    before: Sequence[DeltaRow] = (),
    names: Mapping[Digest, ImageNames] = NO_NAMES,
) -> list[Tag]:
    """Returns the whole page below its heading bar. ``before`` are the deltas of earlier releases,
    ``names`` what images call themselves.
    """
    found = report(row.details, row.full_bytes, row.delta_bytes) if row.key.kind == "v3" else None
    pieces = [
        tags.h1(name(str(names.get(row.key.target) or row.target_repository))),
        tags.p(
            f"{kind_of(row.key)} delta to ",
            *((name(row.target_repository), " ") if names.get(row.key.target) else ()),
            short(row.key.target),
            " from ",
            name(str(names.get(row.key.base) or row.base_repository)),
            " ",
            short(row.key.base),
            tags.span("; devices pull it as ", tags.code(row.tag)) if row.tag else "",
            class_="lead",
        ),
        tags.section(cards(*_figures(row, found, now)), **{"aria-label": "Figures"}),
    ]
    if found is not None:
        pieces += [_layers(found), _map(found), _files(found.files), _advice(found)]
    else:
        pieces.append(_sent(batch_report(row.details, row.full_bytes, row.delta_bytes)))
    pieces += [_releases([row, *before], now, names), _stages(row)]
    return pieces


def _figures(row: DeltaRow, found: DeltaReport | None, now: float) -> list[tuple[str, str, str]]:
    saved = row.full_bytes - row.delta_bytes
    made = f"built in {number_format.duration(row.seconds)}, {number_format.ago(now - row.created)}"
    items = [
        ("Delta", number_format.size(row.delta_bytes), made),
        (
            "Saving",
            number_format.share(saved, row.full_bytes),
            f"{number_format.size(saved)} of {number_format.size(row.full_bytes)}",
        ),
        (
            "Served",
            f"{number_format.number(row.served)}×",
            f"last {number_format.ago(now - row.last_served)}" if row.served else "not yet",
        ),
    ]
    if found is not None:
        items += [
            (
                "Device disk needed",
                number_format.size(found.disk_bytes),
                "for rebuilt layers; the download itself takes none",
            ),
            (
                "Copies per MB",
                f"{found.copies_per_mb:.1f}",
                (
                    f"{number_format.number(found.copies)} copies,"
                    f" {number_format.number(found.small_copies)} of under 64 bytes"
                ),
            ),
        ]
    return items


def _layers(found: DeltaReport) -> Tag:
    shared = (
        "The bottom layer is"
        if found.shared_layers == 1
        else f"{found.shared_layers} layers at the bottom are"
    )
    shared = (
        f"{shared} shared with the base and cost{'s' if found.shared_layers == 1 else ''} nothing. "
    )
    rows: list[list[Piece]] = [
        [
            f"{layer.number}",
            short_diff_id(layer),
            tags.span(
                number_format.size(layer.wire_bytes), share_bar(layer.wire_bytes, found.delta_bytes)
            ),
            number_format.share(layer.wire_bytes, found.delta_bytes),
            number_format.size(layer.size),
            number_format.size(layer.literal_bytes),
            (
                f"{number_format.number(layer.changed)} of {number_format.number(layer.entries)}"
                if layer.entries
                else "–"
            ),
            f"{layer.copies_per_mb:.1f}",
        ]
        for layer in found.layers
    ]
    if not rows:
        return section(
            "layers",
            "Layers",
            tags.p(shared if found.shared_layers else "", "Only the config differs."),
        )
    return section(
        "layers",
        "Layers",
        tags.p(
            shared if found.shared_layers else "",
            "Bytes that are not in the base are sent as compressed literals.",
        ),
        table(
            "Layers of the target that the delta makes, bottom to top",
            [
                "Layer",
                "diff_id",
                "Delta",
                "Of the delta",
                "Unpacked",
                "Literal",
                "Changed",
                "Copies per MB",
            ],
            rows,
            numeric=(2, 3, 4, 5, 6, 7),
        ),
    )


def short_diff_id(layer: LayerPart) -> Tag:
    """Returns the start of a diff ID, with the whole ID as a tooltip."""
    return tags.code(layer.diff_id.removeprefix("sha256:")[:12], title=layer.diff_id)


def _files(files: Sequence[FilePart]) -> Tag:
    if not files:
        return empty("files", "Files", "No file stands out, or it was not recorded.")
    most = max(file.wire_bytes for file in files)
    return section(
        "files",
        "Largest files in the delta",
        table(
            "The most expensive files of the target; sizes in the delta are estimates",
            ["File", "Layer", "Change", "In the delta", "Literal", "Copied", "Size"],
            [
                [
                    path(file.name),
                    f"{file.layer}",
                    verdict(file) or "–",
                    tags.span(
                        f"≈ {number_format.size(file.wire_bytes)}", share_bar(file.wire_bytes, most)
                    ),
                    number_format.size(file.literal_bytes),
                    number_format.size(file.copied_bytes),
                    number_format.size(file.size),
                ]
                for file in files
            ],
            numeric=(1, 3, 4, 5, 6),
        ),
    )


def _map(found: DeltaReport) -> Tag:
    return section("map", "Map of the delta", treemap(found))


def _advice(found: DeltaReport) -> Tag:
    advice = found.advice()
    if not advice:
        return empty("advice", "Advice", "Nothing stands out.")
    return section(
        "advice",
        "Advice for the next release",
        tags.ul(
            *(
                tags.li(
                    name(one.text),
                    f" (about {number_format.size(one.saved)} of this delta)" if one.saved else "",
                )
                for one in advice
            )
        ),
    )


def _releases(rows: Sequence[DeltaRow], now: float, names: Mapping[Digest, ImageNames]) -> Tag:
    if len(rows) < 2:
        return empty("releases", "Last releases", "No earlier release is known.")
    most = max(row.delta_bytes for row in rows)
    return section(
        "releases",
        "Last releases",
        table(
            "The deltas that led to this one's base, newest first",
            ["To", "Delta", "Saving", "In full", "Built"],
            [
                [
                    tags.span(
                        name(str(names.get(row.key.target) or row.target_repository)),
                        " ",
                        short(row.key.target),
                    ),
                    tags.span(
                        number_format.size(row.delta_bytes), share_bar(row.delta_bytes, most)
                    ),
                    number_format.share(row.full_bytes - row.delta_bytes, row.full_bytes),
                    number_format.size(row.full_bytes),
                    moment(row.created, now),
                ]
                for row in rows
            ],
            numeric=(1, 2, 3),
        ),
    )


def _sent(batch: BatchReport | None) -> Tag:
    if batch is None or not batch.files:
        none = "No file's content is sent." if batch is not None else "Not recorded."
        return empty("files", "Files", none)
    most = max(1, *(file.wire_bytes for file in batch.top))
    return section(
        "files",
        "Largest files in the delta",
        tags.p(
            f"{number_format.number(batch.files)} files are sent and take"
            f" {number_format.size(batch.wire_bytes)}; of their {number_format.size(batch.size)},"
            f" {number_format.size(batch.copied_bytes)} are copied from the files of the same"
            f" names. The list of all files takes {number_format.size(batch.head)}."
        ),
        table(
            "The largest files of the batch; copied: from the base's file of the same name",
            ["File", "Sent", "Copied", "Copies", "Size"],
            [
                [
                    path(file.name),
                    tags.span(
                        number_format.size(file.wire_bytes), share_bar(file.wire_bytes, most)
                    ),
                    number_format.size(file.copied_bytes),
                    number_format.number(file.copies),
                    number_format.size(file.size),
                ]
                for file in batch.top
            ],
            numeric=(1, 2, 3, 4),
        ),
    )


def _stages(row: DeltaRow) -> Tag:
    seconds = stage_seconds(row.details)
    if not seconds:
        return empty("stages", "Time", "Not recorded.")
    most = max(seconds.values())
    rows: list[list[Piece]] = [
        [stage, tags.span(number_format.duration(seconds[stage]), share_bar(seconds[stage], most))]
        for stage in sorted(seconds, key=_in_order)
    ]
    return section(
        "stages",
        "Build time by stage",
        table(
            "Stages of the build; those of all layers together",
            ["Stage", "Time"],
            rows,
            numeric=(1,),
        )(class_="narrow"),
    )


def _in_order(stage: str) -> tuple[int, str]:
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER)), stage
