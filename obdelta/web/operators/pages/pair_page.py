"""The page of one delta: why it is as large as it is, and its costs for a device."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.web.template import Tag, tags

from obdelta.builds.build_metrics import stage_seconds
from obdelta.delta.reports.image_report import DeltaReport, FilePart, LayerPart, report
from obdelta.rsync.batch_report import BatchReport, batch_report
from obdelta.store.catalogue.records import DeltaRow
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import Piece, cards, name, section, short, table
from obdelta.web.operators.pages.plot import share_bar

_ORDER = ("fetch", "index", "match", "deflate", "record", "prove")


def content(row: DeltaRow, now: float) -> list[Tag]:
    """Returns the whole page below its heading bar."""
    found = report(row.details, row.full_bytes, row.delta_bytes) if row.key.kind == "v3" else None
    pieces = [
        tags.h1(name(row.target_repository)),
        tags.p(
            f"{row.key.kind} delta to ",
            short(row.key.target),
            " from ",
            name(row.base_repository),
            " ",
            short(row.key.base),
            tags.span("; devices pull it as ", tags.code(row.tag)) if row.tag else "",
            class_="lead",
        ),
        tags.section(cards(*_figures(row, found, now)), **{"aria-label": "Figures"}),
    ]
    if found is not None:
        pieces += [_layers(found), _files(found.files)]
    else:
        pieces.append(_sent(batch_report(row.details, row.full_bytes, row.delta_bytes)))
    pieces.append(_stages(row))
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
                "for layers that are made; the download takes none",
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
            "What is not found in the base travels as literal bytes, compressed.",
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
        return section(
            "files", "Files", tags.p("No file stands out, or it was not recorded.", class_="none")
        )
    most = max(file.wire_bytes for file in files)
    return section(
        "files",
        "Files that made it big",
        table(
            "The most expensive files of the target; sizes in the delta are estimates",
            ["File", "Layer", "In the delta", "Literal", "Copied", "Size"],
            [
                [
                    name(file.name),
                    f"{file.layer}",
                    tags.span(
                        f"≈ {number_format.size(file.wire_bytes)}", share_bar(file.wire_bytes, most)
                    ),
                    number_format.size(file.literal_bytes),
                    number_format.size(file.copied_bytes),
                    number_format.size(file.size),
                ]
                for file in files
            ],
            numeric=(1, 2, 3, 4, 5),
        ),
    )


def _sent(batch: BatchReport | None) -> Tag:
    if batch is None or not batch.files:
        none = "No file's content is sent." if batch is not None else "It was not recorded."
        return section("files", "Files", tags.p(none, class_="none"))
    most = max(1, *(file.wire_bytes for file in batch.top))
    return section(
        "files",
        "Files that made it big",
        tags.p(
            f"{number_format.number(batch.files)} files are sent and take"
            f" {number_format.size(batch.wire_bytes)}; of their {number_format.size(batch.size)},"
            f" {number_format.size(batch.copied_bytes)} are copied from the files of the same"
            f" names. The list of all files takes {number_format.size(batch.head)}."
        ),
        table(
            "The files that take most of the batch; copied: from the base's file of the same name",
            ["File", "Sent", "Copied", "Runs", "Size"],
            [
                [
                    name(file.name),
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
        return section("stages", "Time", tags.p("It was not recorded.", class_="none"))
    most = max(seconds.values())
    rows: list[list[Piece]] = [
        [stage, tags.span(number_format.duration(seconds[stage]), share_bar(seconds[stage], most))]
        for stage in sorted(seconds, key=_in_order)
    ]
    return section(
        "stages",
        "Where the time went",
        table(
            "Stages of the build; those of all layers together",
            ["Stage", "Time"],
            rows,
            numeric=(1,),
        )(class_="narrow"),
    )


def _in_order(stage: str) -> tuple[int, str]:
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER)), stage
