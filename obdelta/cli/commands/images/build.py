"""``obdelta build``: writes one v3 delta image to an OCI image layout, with the server's builder.

Its state is in a temporary directory that is removed at the end, so a running server's state is
untouched.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from obdelta.cli.options import OK, Commands, add_json, add_pair, add_setting_options, read_settings
from obdelta.cli.terminal import Line
from obdelta.errors import BlobUnknown, ManifestInvalid, ManifestUnknown
from obdelta.oci import Descriptor, Digest, Manifest, Reference, parse_manifest

if TYPE_CHECKING:
    from obdelta.app.runtime import Runtime
    from obdelta.store.catalogue.records import DeltaRow


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "build",
        run,
        "build one v3 delta image into an OCI image layout",
        "Fetches both images from the upstream, builds and proves the delta as the "
        "server does, and adds it to DIR under its\n"
        "tag. Needs no server. The setting `upstream` is enough where the registry "
        "allows anonymous pulls.",
        [
            "obdelta build fleet/app:1.0 fleet/app:1.1 -o layout --upstream"
            " https://registry.example.com"
        ],
    )
    add_pair(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="the OCI image layout to add it to",
    )
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Builds the delta and prints its figures."""
    from obdelta.cli.layout_writer import put_image

    output: Path = parsed.output
    output.parent.mkdir(parents=True, exist_ok=True)
    with built(parsed, output.parent) as delta:
        put_image(output, delta.tag, delta.manifest, delta.fetch)
    row = delta.row
    saving = 1 - row.delta_bytes / row.full_bytes if row.full_bytes else 0.0
    if parsed.json:
        figures = {"full_bytes": row.full_bytes, "delta_bytes": row.delta_bytes, "saving": saving}
        print(
            json.dumps({"layout": str(output), "tag": delta.tag, **figures, "seconds": row.seconds})
        )
        return OK
    print(
        f"built        {output}:{delta.tag}\n"
        f"full update  {row.full_bytes:>15,} bytes\n"
        f"delta        {row.delta_bytes:>15,} bytes ({saving:.1%} saved)\n"
        f"built in     {row.seconds:>15.2f} s, every layer proven"
    )
    return OK


class Built(NamedTuple):
    """A finished v3 delta on this machine. ``place`` returns where its config and layers are."""

    row: DeltaRow
    manifest: Manifest
    place: Callable[[Digest], Path | None]

    def fetch(self, descriptor: Descriptor) -> Path:
        """Returns the file of its config or of a layer. Raises BlobUnknown for any other blob."""
        path = self.place(descriptor.digest)
        if path is None:
            raise BlobUnknown(descriptor.digest)
        return path

    @property
    def tag(self) -> str:
        """Returns its tag in the target's repository."""
        return self.row.tag or "latest"


@contextmanager
def built(parsed: argparse.Namespace, folder: Path | None = None) -> Iterator[Built]:
    """Builds the delta between ``parsed.source`` and ``parsed.target``. Its files exist inside the
    block only.

    They are in a hidden directory below ``folder``, by default that of temporary files. Raises the
    build's error.
    """
    from obdelta.cli import run_reactor

    source, target = Reference.parse(parsed.source), Reference.parse(parsed.target)
    # A delta on disk has no public name.
    configured = read_settings(parsed, {"public-url": "http://localhost"})
    if getattr(parsed, "form", None) is not None:
        configured = dataclasses.replace(configured, delta_compression=parsed.form)
    with tempfile.TemporaryDirectory(prefix=".obdelta-", dir=folder) as state:
        # A manual build is of interest also if it saves nothing.
        configured = dataclasses.replace(
            configured, state_dir=Path(state), max_delta_ratio=math.inf
        )
        with Line(sys.stderr) as line:
            delta = run_reactor.run(
                configured, lambda runtime: _build(runtime, source, target, line)
            )
        yield delta


async def _build(runtime: Runtime, source: Reference, target: Reference, line: Line) -> Built:
    from obdelta.app.builders import make_v3
    from obdelta.app.components import open_components
    from obdelta.builds.types import pair_for
    from obdelta.oci import Form

    parts = await open_components(runtime)
    builder = make_v3(parts)
    credentials = parts.policy.credentials(None)
    line.show("fetching manifests")
    base, wanted = (
        await parts.lookup.resolve(source, credentials),
        await parts.lookup.resolve(target, credentials),
    )
    # One form is asked for. Without a choice it is the one that every engine reads.
    form = Form.named(parts.settings.delta_compression) or Form.UNIVERSAL
    pair = pair_for(builder, base, wanted, form)
    row = await builder.build(pair, credentials, _BuildProgress(line), lambda _file: None)
    found = await parts.state.catalogue.manifest(row.target_repository, row.content)
    if found is None:
        raise ManifestUnknown(row.target_repository, str(row.content))
    manifest = parse_manifest(found.raw, found.media_type)
    if not isinstance(manifest, Manifest):
        raise ManifestInvalid(str(row.content), "it should be one image")
    return Built(row, manifest, parts.state.blobs.path)


class _BuildProgress:
    """Displays a builder's reports as a bar that never shrinks."""

    def __init__(self, line: Line) -> None:
        self._line, self._share = line, 0.0

    def __call__(self, report: Mapping[str, Any]) -> None:
        stage = str(report.get("stage", ""))
        if "layers" not in report:
            self._line.show(stage)
            return
        layer, layers, of = int(report["layer"]), int(report["layers"]), int(report["of"])
        self._share = max(self._share, (layer + (int(report["done"]) / of if of else 0.0)) / layers)
        self._line.show(f"layer {layer + 1}/{layers} {stage}", self._share)
