"""``obdelta export``: writes a delta image for offline devices, as an archive or an OCI image
layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from obdelta.cli.commands.images.check import add_device
from obdelta.cli.delta_sources import ABOUT, add_source, find_delta, resolve_id
from obdelta.cli.options import OK, Commands, WrongUsage, add_json, add_pair
from obdelta.cli.terminal import Line
from obdelta.errors import BadReference
from obdelta.oci import Reference

FORMATS = ("docker-archive", "oci")


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "export",
        run,
        "write a finished delta to a file, for offline devices",
        "On a device that has SRC, `balena-engine load -i FILE` makes DEST.\n"
        f"\n{ABOUT}\nWith --server, the file holds what a device would be given.",
        [
            "obdelta export 0123456789abcdef -o update.tar",
            "obdelta export SRC DEST -o update.tar",
            (
                "obdelta export SRC DEST -o - --server https://delta.example.com --token @token |"
                " ssh device balena-engine load"
            ),
            (
                "obdelta export fleet/app:1.0 fleet/app:1.1 -o update.tar --upstream"
                " https://registry.example.com"
            ),
        ],
    )
    add_pair(parser, or_id=True)
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the file to write; - for stdout"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        metavar="FORMAT",
        help="docker-archive: one tar (default); oci: a directory",
    )
    parser.add_argument("--name", metavar="NAME", help="repository:tag after it is loaded")
    add_device(parser, required=False)
    add_json(parser)
    add_source(parser)


def run(parsed: argparse.Namespace) -> int:
    """Writes the image and prints its location."""
    from obdelta.cli.commands.images.diff_patch import STANDARD, open_output
    from obdelta.cli.image_archive import write_archive
    from obdelta.cli.layout_writer import put_image

    _check_name(parsed.name)
    to_stdout = parsed.output == STANDARD
    if to_stdout and (parsed.format == "oci" or parsed.json):
        raise WrongUsage(
            "stdout cannot take an OCI layout (a directory), nor an archive beside --json: name"
            " a file"
        )
    resolve_id(parsed)
    if getattr(parsed, "kind", None) == "v2":
        raise WrongUsage(
            "this delta is a v2 batch, which no engine loads: name the ID of a v3 delta"
            " (`obdelta list --kind v3`)"
        )
    with Line(sys.stderr) as line, find_delta(parsed, line, with_files=True) as delta:
        name = parsed.name or delta.name
        if parsed.format == "oci":
            put_image(Path(parsed.output), name.rpartition(":")[2], delta.manifest, delta.fetch)
        else:
            with open_output(parsed.output) as out:
                write_archive(out, name, delta.manifest, delta.fetch)
    size = sum(descriptor.size for descriptor in (delta.manifest.config, *delta.manifest.layers))
    if parsed.json:
        print(
            json.dumps(
                {
                    "file": parsed.output,
                    "format": parsed.format,
                    "name": name,
                    "bytes": size,
                    "delta": delta.row,
                }
            )
        )
    elif not to_stdout:
        print(f"exported {parsed.output}: {name}, {size:,} bytes of delta")
    return OK


def _check_name(name: str | None) -> None:
    if name is None:
        return
    reference = Reference.parse(name)
    if reference.tag is None or reference.digest is not None:
        raise BadReference(name, "the name of an image in an archive is repository:tag")
