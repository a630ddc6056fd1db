"""Sources of a finished delta for commands: a server's store, a server as devices use it, or a
build.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdelta.cli.options import WrongUsage, add_setting_options
from obdelta.cli.tables import printable
from obdelta.cli.terminal import Line
from obdelta.errors import DigestMismatch, ManifestInvalid, ServerFault, SizeMismatch
from obdelta.oci import Descriptor, Digest, Manifest, Reference, parse_manifest

if TYPE_CHECKING:
    from obdelta.cli.operator_client import Operator
    from obdelta.delta.reports.image_report import DeltaReport

ABOUT = (
    "The delta is one that a running server has finished, asked for at its operators' endpoint."
    " With --build, or\n--upstream, it is built here instead, as `obdelta build` does it, without a"
    " server."
)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose between a server's store and a build."""
    from obdelta.cli.operator_client import add_operator

    add_operator(parser, config=False)
    parser.add_argument("--build", action="store_true", help="build the delta here; asks no server")
    add_setting_options(parser)


@dataclass(frozen=True, slots=True)
class FoundDelta:
    """A finished v3 delta. ``row`` describes it as JSON (docs/commands.md). ``name`` is
    ``repository:tag``, with a host if known.

    ``report`` is None where the server gives none. ``fetch`` writes its config or a layer to a file
    that lasts as long as the block.
    """

    row: dict[str, Any]
    report: DeltaReport | None
    name: str
    manifest: Manifest
    fetch: Callable[[Descriptor], Path]


@contextmanager
def found(
    parsed: argparse.Namespace, line: Line, *, fetching: bool = False
) -> Iterator[FoundDelta]:
    """Returns the delta from ``parsed.source`` to ``parsed.target``, from the source that the
    options choose. ``fetching``: with its files.
    """
    here = parsed.build or parsed.upstream is not None
    server = getattr(parsed, "server", None) is not None
    if here + server + (parsed.operator is not None) > 1:
        raise WrongUsage(
            "give one of --operator, --server, and --build (or --upstream): they are different"
            " places"
        )
    source = (
        _built(parsed)
        if here
        else _as_a_device(parsed, line)
        if server
        else _of_store(parsed, line, fetching)
    )
    with source as delta:
        yield delta


@contextmanager
def _built(parsed: argparse.Namespace) -> Iterator[FoundDelta]:
    from obdelta.cli.commands.build import built
    from obdelta.delta.reports.image_report import report
    from obdelta.web.operators.deltas_api import row_as_json

    with built(parsed) as delta:
        row = delta.row
        described = report(row.details, row.full_bytes, row.delta_bytes)
        name = str(Reference.parse(parsed.target).with_tag(delta.tag))
        yield FoundDelta(row_as_json(row), described, name, delta.manifest, delta.fetch)


@contextmanager
def _of_store(parsed: argparse.Namespace, line: Line, fetching: bool) -> Iterator[FoundDelta]:
    from obdelta.cli.operator_client import operator
    from obdelta.delta.reports.image_report import report_from_json

    # Names are parsed before any request, so that errors in them are reported first.
    source, target = Reference.parse(parsed.source), Reference.parse(parsed.target)
    server = operator(parsed)
    line.show("asking the server")
    keep = {"keep": "yes"} if fetching else {}
    answer = server.get("/api/v1/deltas", src=str(source), dest=str(target), **keep)
    with server.understood("a delta"):
        described = report_from_json(answer["report"])
        raw = str(answer["manifest"]["raw"]).encode("utf-8")
        manifest = parse_manifest(raw, str(answer["manifest"]["media_type"]))
        row = dict(answer["delta"])
        name = str(target.with_tag(row["tag"]))
        for side in ("base", "target"):
            Digest.parse(row[side]["digest"])
            printable(row[side]["repository"])
    if not isinstance(manifest, Manifest):
        raise ManifestInvalid("delta image", "it should be one image")
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work:
        yield FoundDelta(
            row, described, name, manifest, _Fetcher(server, Path(work), _Fetched(manifest, line))
        )


class _Fetched:
    """Displays how much of an image has arrived. Called with the size of each piece."""

    def __init__(self, manifest: Manifest, line: Line) -> None:
        self._line, self._done = line, 0
        self._whole = sum(descriptor.size for descriptor in {manifest.config, *manifest.layers})

    def __call__(self, size: int) -> None:
        self._done += size
        self._line.show(f"fetching {self._whole:,} bytes", self._done / self._whole)


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Fetches blobs from a store, and verifies them."""

    server: Operator
    work: Path
    fetched: Callable[[int], None]

    def __call__(self, descriptor: Descriptor) -> Path:
        path = self.work / descriptor.digest.hex
        if not path.exists():
            size = self.server.download(f"/api/v1/blobs/{descriptor.digest}", path, self.fetched)
            if size != descriptor.size:
                raise SizeMismatch(descriptor.size, size, f"blob {descriptor.digest}")
            with path.open("rb") as file:
                actual = Digest(hashlib.file_digest(file, "sha256").hexdigest())
            if actual != descriptor.digest:
                raise DigestMismatch(descriptor.digest, actual, "blob")
        return path


@contextmanager
def _as_a_device(parsed: argparse.Namespace, line: Line) -> Iterator[FoundDelta]:
    from obdelta.cli.commands.check import device
    from obdelta.delta.image import BASE_LABEL
    from obdelta.device.update import labels_of

    client = device(parsed, line)
    name, _ = client.ask(parsed.source, parsed.target, parsed.wait)
    image = client.engine.pull(name)
    if BASE_LABEL not in labels_of(image.config):
        raise ServerFault(
            f"the server at {parsed.server}", f"gave no delta: a device would pull {name} in full"
        )
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work:
        fetched = _Fetched(image.manifest, line)

        def fetch(descriptor: Descriptor) -> Path:
            path = Path(work, descriptor.digest.hex)
            if not path.exists():
                client.engine.download(image, descriptor, path, fetched)
            return path

        row = {"kind": "v3", "tag": name.tag, "content": str(image.manifest.digest)}
        yield FoundDelta(row, None, str(name), image.manifest, fetch)
