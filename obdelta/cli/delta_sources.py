"""Sources of a finished delta for commands: a server's store, a server as devices use it, or a
build.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from obdelta.cli.options import WrongUsage, add_form, add_operator, add_setting_options
from obdelta.cli.tables import printable
from obdelta.cli.terminal import Line
from obdelta.errors import DigestMismatch, ManifestInvalid, SizeMismatch
from obdelta.oci import Descriptor, Digest, Manifest, Reference, parse_manifest

if TYPE_CHECKING:
    from obdelta.cli.operator_client import Operator
    from obdelta.delta.reports.image_report import DeltaReport

ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)
"""An ID of `obdelta list`."""
ABOUT = (
    "A running server gives a finished delta. With --build, or --upstream, it is built here\n"
    "without a server, as `obdelta build` does."
)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose between a server's store and a build."""
    add_operator(parser, config=False)
    add_form(parser)
    parser.add_argument(
        "--build", action="store_true", help="build the delta here, without a server"
    )
    add_setting_options(parser)


@dataclass(frozen=True, slots=True)
class FoundDelta:
    """A finished v3 delta. ``row`` describes it as JSON (docs/commands.md). ``name`` is
    ``repository:tag``, with a host if known.

    ``report`` is None if the server gives none. ``fetch`` writes its config or a layer to a file
    that lasts as long as the block.
    """

    row: dict[str, Any]
    report: DeltaReport | None
    name: str
    manifest: Manifest
    fetch: Callable[[Descriptor], Path]
    releases: Sequence[Mapping[str, Any]] = ()
    """The rows of this delta and those of the releases before it, as far as a server has them."""


@contextmanager
def find_delta(
    parsed: argparse.Namespace, line: Line, *, with_files: bool = False
) -> Iterator[FoundDelta]:
    """Returns the delta from ``parsed.source`` to ``parsed.target``, from the source that the
    options choose. ``with_files``: with its files.
    """
    here = parsed.build or parsed.upstream is not None
    server = getattr(parsed, "server", None) is not None
    if here + server + (parsed.operator is not None) > 1:
        raise WrongUsage(
            "use only one of --operator, --server and --build (or --upstream): each is a "
            "different source"
        )
    source = (
        _from_build(parsed)
        if here
        else _from_device_api(parsed, line)
        if server
        else _from_store(parsed, line, with_files)
    )
    with source as delta:
        yield delta


def resolve_id(parsed: argparse.Namespace) -> None:
    """Replaces the ID of a kept delta by its two images, kind and form, as the server knows them.
    Does nothing if two images are named. Raises WrongUsage, also for an option that names another
    kind or form.
    """
    from obdelta.cli.operator_client import operator

    if parsed.target is not None:
        return
    if not ID.fullmatch(parsed.source):
        raise WrongUsage("name two images, SRC and DEST, or an ID that `obdelta list` shows")
    if parsed.build or parsed.upstream is not None or getattr(parsed, "server", None) is not None:
        raise WrongUsage("an ID is one of a server's store: name two images instead")
    server = operator(parsed)
    entry = server.get(f"/api/v1/deltas/{parsed.source}")
    with server.parsing("a delta"):
        if entry["state"] != "kept":
            why = f": {printable(entry['reason'])}" if entry["reason"] else ""
            raise WrongUsage(f"delta {parsed.source} is {entry['state']}, not kept{why}")
        for option in ("kind", "form") if entry["kind"] == "v3" else ("kind",):
            wanted, own = getattr(parsed, option, None), entry[option]
            if wanted not in (None, own):
                raise WrongUsage(
                    f"delta {parsed.source} is {own}, not {wanted}: leave out --{option}, the ID"
                    " says it"
                )
        parsed.source, parsed.target = str(entry["src"]), str(entry["dest"])
        parsed.form, parsed.kind = str(entry["form"]), str(entry["kind"])


@contextmanager
def _from_build(parsed: argparse.Namespace) -> Iterator[FoundDelta]:
    from obdelta.cli.commands.images.build import built
    from obdelta.delta.reports.image_report import report
    from obdelta.web.operators.deltas_api import row_as_json

    with built(parsed) as delta:
        row = delta.row
        described = report(row.details, row.full_bytes, row.delta_bytes)
        name = str(Reference.parse(parsed.target).with_tag(delta.tag))
        yield FoundDelta(row_as_json(row), described, name, delta.manifest, delta.fetch)


@contextmanager
def _from_store(parsed: argparse.Namespace, line: Line, with_files: bool) -> Iterator[FoundDelta]:
    from obdelta.cli.operator_client import operator
    from obdelta.delta.reports.image_report import report_from_json

    # Names are parsed before any request, so that errors in them are reported first.
    source, target = Reference.parse(parsed.source), Reference.parse(parsed.target)
    server = operator(parsed)
    line.show("requesting the delta")
    more = {"keep": "yes"} if with_files else {}
    if parsed.form is not None:
        more["form"] = parsed.form
    answer = server.get("/api/v1/deltas", src=str(source), dest=str(target), **more)
    with server.parsing("a delta"):
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
            row,
            described,
            name,
            manifest,
            _Fetcher(server, Path(work), _FetchProgress(manifest, line)),
            list(answer.get("releases", ())),
        )


class _FetchProgress:
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
def _from_device_api(parsed: argparse.Namespace, line: Line) -> Iterator[FoundDelta]:
    from obdelta.cli.commands.images.check import device, device_token
    from obdelta.delta.image import BASE_LABEL
    from obdelta.device.http import ServerFault
    from obdelta.device.update import labels_of

    client = device(parsed, line, device_token(parsed.token))
    name, _ = client.ask(parsed.source, parsed.target, parsed.wait)
    image = client.engine.pull(name)
    if BASE_LABEL not in labels_of(image.config):
        raise ServerFault(
            f"the server at {parsed.server}", f"gave no delta: a device would pull {name} in full"
        )
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work:
        fetched = _FetchProgress(image.manifest, line)

        def fetch(descriptor: Descriptor) -> Path:
            path = Path(work, descriptor.digest.hex)
            if not path.exists():
                client.engine.download(image, descriptor, path, fetched)
            return path

        row = {"kind": "v3", "tag": name.tag, "content": str(image.manifest.digest)}
        yield FoundDelta(row, None, str(name), image.manifest, fetch)
