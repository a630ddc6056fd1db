"""One update of one device: request a delta, pull it, patch the base, prove the target.

A v3 delta image names its base's image ID and carries the target's config unchanged
(``docs/wire-protocol.md``). An update is only returned when every diff_id and the image ID are the
target's. Everything else is an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from obdelta import __version__
from obdelta.delta.build import LayerFile
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL
from obdelta.delta.inflate import import_layer
from obdelta.device.http import Http, ServerFault, TimedOut
from obdelta.device.layer_check import check_patched, check_shared
from obdelta.device.pull import AGENTS as ENGINE_AGENTS
from obdelta.device.pull import Engine, PulledImage
from obdelta.errors import DigestMismatch, ManifestInvalid
from obdelta.oci.config import ImageConfig, parse_config
from obdelta.oci.digest import DiffID, Digest, common_prefix
from obdelta.oci.form import Form
from obdelta.oci.manifest import Descriptor
from obdelta.oci.reference import Reference

REQUEST_TIMEOUT = 59.0
"""Seconds that a supervisor gives the API (``deltaRequestTimeout``)."""
AGENTS = {
    form: f"Supervisor/16.1.0 (Linux; balenaOS {form.traits.os}; obdelta {__version__})"
    for form in Form
}
"""The ``User-Agent`` of a supervisor, by the best form that its engine reads."""
MAX_LAYER = 64 << 30
"""Bytes that one layer may inflate to."""
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
    requests: int
    request_seconds: float
    pulling_seconds: float
    patching_seconds: float

    @property
    def saving(self) -> float:
        """Returns the share of the full pull's bytes that was not sent."""
        return 1 - self.pulled_bytes / self.full_bytes if self.full_bytes else 0.0


@dataclass(slots=True)
class _Costs:
    """Bytes and seconds so far."""

    pulled: int = 0
    pulling: float = 0.0
    patching: float = 0.0


def device_for(
    form: Form | None,
    server: str,
    token: str | None = None,
    *,
    registry: str | None = None,
    platform: str | None = None,
    http: Http | None = None,
    step: Callable[[str], None] = lambda _text: None,
) -> Device:
    """Returns a device whose engine reads ``form`` at best. None: the engine does not name itself.
    ``http`` has the other options of its connections.
    """
    http = http or Http()
    of_engine = http
    if form is not None:
        http = replace(http, user_agent=AGENTS[form])
        of_engine = replace(http, user_agent=ENGINE_AGENTS[form])
    return Device(http, Engine(of_engine, token, registry, platform), server, token, step=step)


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
        """Pulls an image as the base of later updates. Its layers stay in ``work``."""
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
        requests = 0
        while True:
            requests += 1
            fault: ServerFault
            try:
                with self.http.request("GET", url, headers, timeout=REQUEST_TIMEOUT) as answer:
                    if answer.status == 200:
                        return _name(answer.small(_MAX_ANSWER), answer.request), requests
                    fault = answer.fault()
                    if answer.status not in (502, 504):
                        raise fault
            except TimedOut as timed_out:
                fault = timed_out
            pause = _PAUSES[min(requests, len(_PAUSES)) - 1]
            if self.clock() + pause > end:
                raise fault
            self.step("the delta is being built")
            self.sleep(pause)

    def update(
        self, base: Base, source: str, target: str, work: Path, deadline: float = 900.0
    ) -> Update:
        """Runs an update, from the request to the last diff_id. The directory ``work`` holds one
        layer at a time and is left empty.

        Raises ServerFault for an answer that a device cannot use. Raises DigestMismatch,
        LayerInvalid, StreamInvalid or ManifestInvalid for content that does not lead to the target.
        """
        started = self.clock()
        name, requests = self.ask(source, target, deadline)
        request_seconds = self.clock() - started
        costs = _Costs()
        started = self.clock()
        wanted = self.engine.pull(Reference.parse(target))
        pulled = self.engine.pull(name)
        costs.pulling += self.clock() - started
        labels = labels_of(pulled.config)
        is_delta = BASE_LABEL in labels or CONFIG_LABEL in labels
        if is_delta:
            self._apply(base, wanted, pulled, labels, work, costs)
        else:
            self._apply_full_pull(base, wanted, pulled, work, costs)
        shared = common_prefix(base.diff_ids, wanted.config.diff_ids)
        return Update(
            str(name),
            is_delta,
            wanted.config.image_id,
            wanted.small_bytes + sum(layer.size for layer in wanted.manifest.layers[shared:]),
            pulled.small_bytes + costs.pulled,
            len(pulled.manifest.layers),
            requests,
            request_seconds,
            costs.pulling,
            costs.patching,
        )

    def _apply(
        self,
        base: Base,
        wanted: PulledImage,
        delta: PulledImage,
        labels: dict[str, str],
        work: Path,
        costs: _Costs,
    ) -> None:
        if labels.get(BASE_LABEL) != str(base.image_id):
            raise DigestMismatch(base.image_id, labels.get(BASE_LABEL), f"label {BASE_LABEL}")
        labelled_config = parse_config(
            labels.get(CONFIG_LABEL, "").encode("utf-8"), f"label {CONFIG_LABEL}"
        )
        if labelled_config.image_id != wanted.config.image_id:
            raise DigestMismatch(
                wanted.config.image_id, labelled_config.image_id, f"label {CONFIG_LABEL}"
            )
        targets = labelled_config.diff_ids
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
            layer_costs = costs if number >= shared else _Costs()
            with self._downloaded(delta, blob, work, layer_costs) as path:
                started = self.clock()
                if number < shared:
                    check_shared(base.layers, path, diff_id, targets[number])
                else:
                    check_patched(base.layers, path, diff_id, targets[number])
                costs.patching += self.clock() - started

    def _apply_full_pull(
        self, base: Base, wanted: PulledImage, pulled: PulledImage, work: Path, costs: _Costs
    ) -> None:
        if pulled.config.image_id != wanted.config.image_id:
            raise DigestMismatch(
                wanted.config.image_id, pulled.config.image_id, "config of the image in the answer"
            )
        shared = common_prefix(base.diff_ids, pulled.config.diff_ids)
        remaining = zip(
            pulled.manifest.layers[shared:], pulled.config.diff_ids[shared:], strict=True
        )
        for number, (blob, diff_id) in enumerate(remaining, shared + 1):
            self.step(f"layer {number}/{len(pulled.manifest.layers)}")
            started = self.clock()
            # In a directory of its own: the base may have a layer of the same diff_id.
            with TemporaryDirectory(dir=work) as own:
                self._inflated(pulled, blob, diff_id, Path(own))
            costs.pulling += self.clock() - started
            costs.pulled += blob.size

    @contextmanager
    def _downloaded(
        self, image: PulledImage, blob: Descriptor, work: Path, costs: _Costs
    ) -> Iterator[Path]:
        path = work / f"{blob.digest.hex}.blob"
        try:
            started = self.clock()
            self.engine.download(image, blob, path)
            costs.pulling += self.clock() - started
            costs.pulled += blob.size
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _inflated(
        self, image: PulledImage, blob: Descriptor, diff_id: DiffID, work: Path
    ) -> LayerFile:
        """Pulls a layer and inflates it to ``work``. Verifies its diff_id."""
        out = work / f"{diff_id.hex}.tar"
        try:
            with self._downloaded(image, blob, work, _Costs()) as path:
                layer = import_layer(path, out, limit=MAX_LAYER)
            if layer.diff_id != diff_id:
                raise DigestMismatch(diff_id, layer.diff_id, "inflated layer")
        except BaseException:
            out.unlink(missing_ok=True)
            raise
        return LayerFile(diff_id, out, layer.size)


def _name(body: bytes, request: str) -> Reference:
    # Supervisors parse the body as JSON whatever its content type.
    try:
        name = json.loads(body)["name"]
    except (ValueError, LookupError, TypeError) as error:
        raise ServerFault(
            request, "answered 200, but not with a JSON object that has a name", status=200
        ) from error
    return Reference.parse(str(name))


def labels_of(config: ImageConfig) -> dict[str, str]:
    """Returns an image's labels."""
    inner = config.value.get("config")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    return (
        {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
    )
