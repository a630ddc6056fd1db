"""``obdelta explain``: which layers and files account for a delta's size."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obdelta.cli.delta_sources import ABOUT, add_source, find_delta, resolve_id
from obdelta.cli.options import OK, Commands, WrongUsage, add_json, add_pair
from obdelta.cli.parser import number
from obdelta.cli.tables import fields, short_image, table
from obdelta.cli.terminal import Line
from obdelta.oci import Reference

if TYPE_CHECKING:
    from obdelta.delta.reports.image_report import DeltaReport
    from obdelta.rsync.batch_report import BatchReport


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "explain",
        run,
        "show which layers and files make a delta large",
        f"{ABOUT}\n\nAn image without tag and digest stands for the newest finished delta between"
        " the two repositories. For each layer, the\n20 tar entries with the most literal bytes are"
        " recorded. The bytes of a layer are exact, those of an entry are\nestimated.",
        [
            "obdelta explain 0123456789abcdef",
            "obdelta explain v2/1234…@sha256:… v2/5678…@sha256:…",
            (
                "obdelta explain fleet/app:1.0 fleet/app:1.1 --upstream"
                " https://registry.example.com --json | jq '.report.files[0]'"
            ),
        ],
    )
    add_pair(parser, or_id=True)
    parser.add_argument(
        "--kind",
        choices=("v3", "v2"),
        help="kind of delta (v3); v2 only from a server's store",
    )
    parser.add_argument(
        "--top", metavar="N", type=number(0), default=20, help="number of entries to show (20)"
    )
    add_json(parser)
    add_source(parser)


def run(parsed: argparse.Namespace) -> int:
    resolve_id(parsed)
    if parsed.kind == "v2":
        return _batch(parsed)
    with Line(sys.stderr) as line, find_delta(parsed, line) as delta:
        report, row, releases = delta.report, delta.row, list(delta.releases)
    if report is None:
        raise AssertionError("a store and a build have a report")
    print(
        json.dumps({"delta": row, "report": report.as_json(), "releases": releases})
        if parsed.json
        else as_text(row, report, parsed.top, releases)
    )
    return OK


def _batch(parsed: argparse.Namespace) -> int:
    from obdelta.cli.operator_client import operator
    from obdelta.rsync.batch_report import batch_report_from_json

    if parsed.build or parsed.upstream is not None:
        raise WrongUsage(
            "a v2 delta is explained by the server that built it: use neither --build nor "
            "--upstream"
        )
    source, target = Reference.parse(parsed.source), Reference.parse(parsed.target)
    server = operator(parsed)
    answer = server.get("/api/v1/deltas", src=str(source), dest=str(target), kind="v2")
    with server.parsing("a delta"):
        row = dict(answer["delta"])
        report = batch_report_from_json(answer["report"]) if answer["report"] is not None else None
        text = batch_as_text(row, report, parsed.top)
    print(
        json.dumps({"delta": row, "report": report.as_json() if report is not None else None})
        if parsed.json
        else text
    )
    return OK


def batch_as_text(row: Mapping[str, Any], report: BatchReport | None, top: int) -> str:
    """Returns a v2 delta's report as text. None: the delta is older than such reports."""
    full, delta = int(row["full_bytes"]), int(row["delta_bytes"])
    rows = [
        ("delta", f"v2 batch {row['content']}"),
        *_images(row),
        ("full update", f"{full:>15,} bytes"),
        ("delta", f"{delta:>15,} bytes ({1 - delta / full if full else 0.0:.1%} saved)"),
    ]
    if report is None:
        return f"{fields(rows)}\n\nthe files were not recorded"
    rows += [
        ("file list", f"{report.head:>15,} bytes, of all files"),
        (
            "files sent",
            f"{report.wire_bytes:>15,} bytes, of {report.files:,} files with {report.size:,} bytes",
        ),
        (
            "copied",
            (
                f"{report.copied_bytes:>15,} bytes, from files of the same names, in"
                f" {report.copies:,} runs"
            ),
        ),
    ]
    files = [
        [
            f"{file.wire_bytes:,}",
            f"{file.copied_bytes:,}",
            f"{file.size:,}",
            f"{file.copies:,}",
            file.name,
        ]
        for file in report.top[: max(top, 0)]
    ]
    head = [">delta bytes", ">copied bytes", ">of file bytes", ">runs", "file"]
    return "\n\n".join([fields(rows), *([table(head, files)] if files else [])])


def as_text(
    row: Mapping[str, Any],
    report: DeltaReport,
    top: int,
    releases: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns the report as text."""
    head = fields(
        [
            ("delta", f"{row['target']['repository']}:{row['tag']}"),
            *_images(row),
            ("full update", f"{report.full_bytes:>15,} bytes"),
            ("delta", f"{report.delta_bytes:>15,} bytes ({report.saving:.1%} saved)"),
            ("literals", f"{report.literal_bytes:>15,} bytes, before compression"),
            ("copied", f"{report.copied_bytes:>15,} bytes, from the base"),
            (
                "copies",
                (
                    f"{report.copies:>15,} ({report.copies_per_mb:.1f} a MB,"
                    f" {report.small_copies:,} of less than 64 bytes)"
                ),
            ),
            (
                "device disk",
                f"{report.disk_bytes:>15,} bytes, about, for the layers that it does not have yet",
            ),
        ]
    )
    return "\n\n".join(
        [
            head,
            _layers(report),
            *([_files(report, top)] if report.files and top > 0 else []),
            *_advice(report),
            *_releases(releases),
        ]
    )


def _images(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the lines of both images, with the names that they give themselves."""
    lines = []
    for title, image in (("from", row["base"]), ("to", row["target"])):
        lines.append((title, f"{image['repository']}@{image['digest']}"))
        named = image.get("names", {}).get("text")
        if named:
            lines.append(("", named))
    return lines


def _layers(report: DeltaReport) -> str:
    rows = [
        [str(number), "0", "", "", "", "", "shared with the base"]
        for number in range(1, report.shared_layers + 1)
    ]
    for layer in report.layers:
        changed = (
            f"{layer.changed:,} of {layer.entries:,} entries" if layer.entries else "no entries"
        )
        if layer.rest is None:
            changed = "copied whole from the base" if layer.copies == 1 else "not recorded"
        rows.append(
            [
                str(layer.number),
                f"{layer.wire_bytes:,}",
                f"{layer.literal_bytes:,}",
                f"{layer.size:,}",
                f"{layer.copies:,}",
                f"{layer.copies_per_mb:.1f}",
                changed,
            ]
        )
    return table(
        [
            "layer",
            ">delta bytes",
            ">literal bytes",
            ">of layer bytes",
            ">copies",
            ">a MB",
            "changed",
        ],
        rows,
    )


def _files(report: DeltaReport, top: int) -> str:
    from obdelta.delta.reports.image_report import verdict

    rows = [
        [
            f"{file.wire_bytes:,}",
            f"{file.literal_bytes:,}",
            f"{file.size:,}",
            f"{file.copies:,}",
            str(file.layer),
            verdict(file),
            file.name,
        ]
        for file in report.files[:top]
    ]
    head = [">delta bytes, about", ">literal bytes", ">of file bytes", ">copies", "layer"]
    return table([*head, "change", "entry"], rows)


def _advice(report: DeltaReport) -> list[str]:
    """Returns the table of advice, or nothing."""
    rows = [
        [f"{advice.saved:,}" if advice.saved else "?", advice.text] for advice in report.advice()
    ]
    return [table([">would save, about", "advice for the next release"], rows)] if rows else []


def _releases(releases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of this release and those before it, or nothing for a single one."""
    if len(releases) < 2:
        return []
    rows = [
        [
            f"{row['delta_bytes']:,}",
            f"{row['full_bytes']:,}",
            f"{1 - row['delta_bytes'] / row['full_bytes']:.1%}" if row["full_bytes"] else "",
            short_image(row["target"]["repository"], row["target"]["digest"]),
            row["target"].get("names", {}).get("text", ""),
        ]
        for row in releases
    ]
    return [table([">delta bytes", ">full bytes", ">saved", "last releases", "name"], rows)]
