"""One update of one device: request a delta, pull it, patch the base, prove the target.

A v3 delta image names its base's image ID and carries the target's config unchanged
(``docs/wire-protocol.md``). An update is only returned when every diff_id and the image ID are the
target's. Everything else is an error.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

from obdelta.delta.apply import patch
from obdelta.delta.build import LayerFile
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.delta.inflate import import_layer
from obdelta.device.http import Http
from obdelta.device.pull import Engine, Pulled
from obdelta.errors import DigestMismatch, LayerInvalid, ManifestInvalid, ServerFault, TimedOut
from obdelta.oci.config import ImageConfig, parse_config
from obdelta.oci.digest import DiffID, Digest, common_prefix
from obdelta.oci.manifest import Descriptor
from obdelta.oci.reference import Reference

ASK_TIMEOUT = 59.0
"""Seconds that a supervisor gives the API (``deltaRequestTimeout``)."""
MAX_LAYER = 64 << 30
"""Bytes that one layer may inflate to."""
_CHUNK = 1 << 20
_MAX_ANSWER = 64 * 1024
_PAUSES = (0.25, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Base:
    """The image that the device runs: its ID, and its layers as plain tars on
    disk, bottom to top.
    """

    image_id: Digest
    layers: tuple[LayerFile, ...]

    @property
    def diff_ids(self) -> tuple[DiffID, ...]:
        """Returns the diff_ids, bottom to top."""
        return tuple(layer.diff_id for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Update:
    """A finished and verified update. Bytes are those on the wire. A full pull leaves out the
    layers that both images share.
    """

    name: str
    is_delta: bool
    image_id: Digest
    full_bytes: int
    pulled_bytes: int
    layers: int
    asked: int
    asking_seconds: float
    pulling_seconds: float
    patching_seconds: float

    @property
    def saving(self) -> float:
        """Returns the share of the full pull's bytes that was not sent."""
        return 1 - self.pulled_bytes / self.full_bytes if self.full_bytes else 0.0


@dataclass(slots=True)
class _Spent:
    """Bytes and seconds so far."""

    pulled: int = 0
    pulling: float = 0.0
    patching: float = 0.0


@dataclass(slots=True)
class Device:
    """A device, and the delta server (``server``, a URL) that it uses."""

    http: Http
    engine: Engine
    server: str
    token: str | None = field(default=None, repr=False)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    step: Callable[[str], None] = lambda _text: None

    def load_base(self, reference: Reference, work: Path) -> Base:
        """Pulls an image as the base of later updates. Its layers stay in the folder ``work``."""
        image = self.engine.pull(reference)
        known: dict[DiffID, LayerFile] = {}
        for number, (blob, diff_id) in enumerate(
            zip(image.manifest.layers, image.config.diff_ids, strict=True), 1
        ):
            self.step(f"base layer {number}/{len(image.manifest.layers)}")
            if diff_id not in known:
                known[diff_id] = self._inflated(image, blob, diff_id, work)
        return Base(
            image.config.image_id, tuple(known[diff_id] for diff_id in image.config.diff_ids)
        )

    def ask(self, base: str, target: str, deadline: float) -> tuple[Reference, int]:
        """Returns the name that API v3 answers with, and the number of requests. 502 and 504 mean
        "ask again", for ``deadline`` seconds.

        The two image names are sent unescaped, as supervisors send them.
        """
        url = f"{self.server.rstrip('/')}/api/v3/delta?src={base}&dest={target}"
        headers = {"Authorization": f"Bearer {self.token}"} if self.token is not None else {}
        end = self.clock() + deadline
        asked = 0
        while True:
            asked += 1
            fault: ServerFault
            try:
                with self.http.ask("GET", url, headers, timeout=ASK_TIMEOUT) as answer:
                    if answer.status == 200:
                        return _name(answer.small(_MAX_ANSWER), answer.what), asked
                    fault = answer.fault()
                    if answer.status not in (502, 504):
                        raise fault
            except TimedOut as timed_out:
                fault = timed_out
            pause = _PAUSES[min(asked, len(_PAUSES)) - 1]
            if self.clock() + pause > end:
                raise fault
            self.step("the delta is being built")
            self.sleep(pause)

    def update(
        self, base: Base, source: str, target: str, work: Path, deadline: float = 900.0
    ) -> Update:
        """Runs an update, from the request to the last diff_id. The folder ``work`` holds one layer
        at a time and is left empty.

        Raises ServerFault for an answer that a device cannot use. Raises DigestMismatch,
        LayerInvalid, StreamInvalid or ManifestInvalid for content that does not lead to the target.
        """
        begun = self.clock()
        name, asked = self.ask(source, target, deadline)
        asking = self.clock() - begun
        spent = _Spent()
        begun = self.clock()
        wanted = self.engine.pull(Reference.parse(target))
        answered = self.engine.pull(name)
        spent.pulling += self.clock() - begun
        labels = labels_of(answered.config)
        is_delta = BASE_LABEL in labels or CONFIG_LABEL in labels
        if is_delta:
            self._apply(base, wanted, answered, labels, work, spent)
        else:
            self._take_whole(base, wanted, answered, work, spent)
        shared = common_prefix(base.diff_ids, wanted.config.diff_ids)
        return Update(
            str(name),
            is_delta,
            wanted.config.image_id,
            wanted.small_bytes + sum(layer.size for layer in wanted.manifest.layers[shared:]),
            answered.small_bytes + spent.pulled,
            len(answered.manifest.layers),
            asked,
            asking,
            spent.pulling,
            spent.patching,
        )

    def _apply(
        self,
        base: Base,
        wanted: Pulled,
        delta: Pulled,
        labels: dict[str, str],
        work: Path,
        spent: _Spent,
    ) -> None:
        if labels.get(BASE_LABEL) != str(base.image_id):
            raise DigestMismatch(base.image_id, labels.get(BASE_LABEL), f"label {BASE_LABEL}")
        carried = parse_config(
            labels.get(CONFIG_LABEL, "").encode("utf-8"), f"label {CONFIG_LABEL}"
        )
        if carried.image_id != wanted.config.image_id:
            raise DigestMismatch(wanted.config.image_id, carried.image_id, f"label {CONFIG_LABEL}")
        targets = carried.diff_ids
        if len(targets) != len(delta.manifest.layers):
            raise ManifestInvalid(
                "delta image",
                f"{len(delta.manifest.layers)} layers for {len(targets)} of the target",
            )
        shared = common_prefix(base.diff_ids, targets)
        for number, (blob, diff_id) in enumerate(
            zip(delta.manifest.layers, delta.config.diff_ids, strict=True)
        ):
            self.step(f"delta layer {number + 1}/{len(targets)}")
            # An engine skips the layers that it has. They are checked here, and do not count as
            # transferred.
            account = spent if number >= shared else _Spent()
            with self._downloaded(delta, blob, work, account) as path:
                begun = self.clock()
                if number < shared:
                    check_shared(base.layers, path, diff_id, targets[number])
                else:
                    check_patched(base.layers, path, diff_id, targets[number])
                spent.patching += self.clock() - begun

    def _take_whole(
        self, base: Base, wanted: Pulled, answered: Pulled, work: Path, spent: _Spent
    ) -> None:
        if answered.config.image_id != wanted.config.image_id:
            raise DigestMismatch(
                wanted.config.image_id, answered.config.image_id, "the answered image's config"
            )
        shared = common_prefix(base.diff_ids, answered.config.diff_ids)
        remaining = zip(
            answered.manifest.layers[shared:], answered.config.diff_ids[shared:], strict=True
        )
        for number, (blob, diff_id) in enumerate(remaining, shared + 1):
            self.step(f"layer {number}/{len(answered.manifest.layers)}")
            begun = self.clock()
            # In a folder of its own: the base may have a layer of the same diff_id.
            with TemporaryDirectory(dir=work) as own:
                self._inflated(answered, blob, diff_id, Path(own))
            spent.pulling += self.clock() - begun
            spent.pulled += blob.size

    @contextmanager
    def _downloaded(
        self, image: Pulled, blob: Descriptor, work: Path, spent: _Spent
    ) -> Iterator[Path]:
        path = work / f"{blob.digest.hex}.blob"
        try:
            begun = self.clock()
            self.engine.download(image, blob, path)
            spent.pulling += self.clock() - begun
            spent.pulled += blob.size
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _inflated(self, image: Pulled, blob: Descriptor, diff_id: DiffID, work: Path) -> LayerFile:
        """Pulls a layer and inflates it to ``work``. Verifies its diff_id."""
        out = work / f"{diff_id.hex}.tar"
        try:
            with self._downloaded(image, blob, work, _Spent()) as path:
                layer = import_layer(path, out, limit=MAX_LAYER)
            if layer.diff_id != diff_id:
                raise DigestMismatch(diff_id, layer.diff_id, "inflated layer")
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        return LayerFile(diff_id, out, layer.size)


def _name(body: bytes, what: str) -> Reference:
    # Supervisors parse the body as JSON whatever its content type.
    try:
        name = json.loads(body)["name"]
    except (ValueError, LookupError, TypeError) as error:
        raise ServerFault(
            what, "answered 200, but not with a JSON object that has a name", status=200
        ) from error
    return Reference.parse(str(name))


def labels_of(config: ImageConfig) -> dict[str, str]:
    """Returns an image's labels."""
    inner = config.value.get("config")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    return (
        {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
    )


class _Hashed:
    """A reader that hashes the bytes read, for the stream mode of :mod:`tarfile`."""

    def __init__(self, inner: BinaryIO) -> None:
        self._inner, self._sha256 = inner, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._inner.read(size)
        self._sha256.update(chunk)
        return chunk

    def finish(self) -> DiffID:
        """Reads the rest, and returns the hash of everything."""
        while self.read(_CHUNK):
            pass
        return DiffID(self._sha256.hexdigest())


@contextmanager
def _opened(blob: Path, diff_id: DiffID) -> Iterator[_Hashed]:
    """Opens a layer blob inflated, as an engine does (gzip, bzip2 or plain, by its first bytes).
    Verifies its diff_id.
    """
    with blob.open("rb") as file:
        head = file.read(3)
    opener = gzip.open if head[:2] == b"\x1f\x8b" else bz2.open if head == b"BZh" else open
    try:
        with opener(blob, "rb") as inner:
            source = _Hashed(cast(BinaryIO, inner))
            yield source
            actual = source.finish()
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise LayerInvalid(diff_id, f"cannot be inflated: {error}") from error
    if actual != diff_id:
        raise DigestMismatch(diff_id, actual, "inflated delta layer")


def check_shared(base: Sequence[LayerFile], blob: Path, diff_id: DiffID, target: DiffID) -> None:
    """Checks the delta layer of a layer that both images share: a copy of it, or the empty tar of
    balena-engine.
    """
    if diff_id != EMPTY_LAYER_DIFF_ID:
        check_patched(base, blob, diff_id, target)
        return
    with _opened(blob, diff_id):
        pass


def check_patched(base: Sequence[LayerFile], blob: Path, diff_id: DiffID, target: DiffID) -> None:
    """Checks a delta layer whose first entry is ``delta``: a stream from the base to the target's
    layer.
    """
    with (
        _opened(blob, diff_id) as source,
        tarfile.open(fileobj=cast(BinaryIO, source), mode="r|") as tar,
    ):
        member = tar.next()
        stream = tar.extractfile(member) if member is not None and member.name == "delta" else None
        if stream is None:
            raise LayerInvalid(diff_id, "its first entry is not a file named delta")
        with stream:
            made = patch(base, cast(BinaryIO, stream), None)
    if made != target:
        raise DigestMismatch(target, made, "patched layer")
