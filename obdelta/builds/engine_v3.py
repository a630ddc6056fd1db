"""The v3 builder that lets a balena-engine make the delta (setting ``builder``).

The engine pulls both images and makes the delta; what it made is saved into our store, packed and proven like our own, and from
there it is served or pushed. The engine keeps nothing of it: every image that was pulled for a build goes, none that it had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.builds.concurrent import first_failure, settle
from obdelta.builds.delta_image import DeltaImages
from obdelta.builds.engine import EngineApi, SavedImage, Watch
from obdelta.builds.images import ResolvedImage
from obdelta.builds.layers import LayerImporter, wanted_layers
from obdelta.builds.pair import Grows, Pair, Report
from obdelta.builds.pool import WorkerPool
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.errors import EngineFailed, EngineUnavailable, ProofFailed
from obdelta.oci import DiffID, Digest, ImageConfig, Reference, common_prefix, parse_config
from obdelta.registry import Credentials, Upstream
from obdelta.store.blobs import BlobStore
from obdelta.store.layers import PinnedLayer
from obdelta.store.rows import DeltaRow, Kind
from obdelta.store.threads import Threads, shielded

log = Logger()

ENGINE_RECIPE = 100_001
"""Far from the native builder's, which are counted from 1."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    """An image that builds need the engine to have. ``pulled``: the name under which it was pulled for them."""

    lock: DeferredLock = field(default_factory=DeferredLock)
    users: int = 0
    there: bool = False
    pulled: str | None = None


class Engine:
    """The engine seen from the reactor: its calls run in threads of their own, and images are pulled once for all builds.

    ``host`` is what the engine calls the registry.
    """

    def __init__(self, api: EngineApi, threads: Threads, host: str) -> None:
        self.api, self._threads, self._host = api, threads, host
        self._held: dict[Digest, _Held] = {}

    async def call(self, watch: Watch, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A blocking call. Cancelling stops the watch, and ends only when the call has ended: it may own files."""
        work = self._threads.start(function, *args, **kwargs)
        try:
            return await shielded(work)
        except CancelledError:
            watch.stop()
            ended: Deferred[None] = Deferred()
            work.addBoth(lambda _: ended.callback(None))
            await ended
            raise

    async def why_away(self) -> str | None:
        """What keeps the engine from being asked, None when it answers (readiness)."""
        try:
            await self._threads.run(self.api.version)
        except (EngineUnavailable, EngineFailed) as error:
            return str(error)
        return None

    async def hold(self, image: ResolvedImage, credentials: Credentials, watch: Watch) -> None:
        """Returns once the engine has the image; :meth:`release` it afterwards, unless this raises."""
        image_id = image.manifest.config.digest
        held = self._held.setdefault(image_id, _Held())
        held.users += 1
        try:
            await held.lock.acquire()
            try:
                if not held.there:
                    await self._bring(held, image, credentials, watch)
            finally:
                held.lock.release()
        except BaseException:
            await self.release(image)
            raise

    async def _bring(self, held: _Held, image: ResolvedImage, credentials: Credentials, watch: Watch) -> None:
        image_id = image.manifest.config.digest
        if await self.call(watch, self.api.image_id, str(image_id)) is None:
            reference = Reference(self._host, image.repository, digest=image.manifest.digest)
            held.pulled = str(reference)
            await self.call(watch, self.api.pull, reference, credentials, watch)
            found = await self.call(watch, self.api.image_id, held.pulled)
            if found != image_id:
                raise EngineFailed(f"it pulled {found} where {image_id} was meant")
        held.there = True

    async def release(self, image: ResolvedImage) -> None:
        """One build less that needs it. What was pulled goes with the last one; what was there before stays."""
        image_id = image.manifest.config.digest
        held = self._held[image_id]
        held.users -= 1
        if held.users:
            return
        await held.lock.acquire()
        try:
            if held.users == 0 and self._held.get(image_id) is held:
                del self._held[image_id]
                if held.pulled is not None:
                    await self.remove(held.pulled)
        finally:
            held.lock.release()

    async def remove(self, name: str) -> None:
        """Takes an image's name away; an engine that is away keeps it, and it is logged."""
        try:
            await self.call(Watch(), self.api.remove, name)
        except (EngineUnavailable, EngineFailed) as error:
            log.warn("the engine still has {name}: {reason}", name=name, reason=str(error))


class EngineV3:
    """Builds v3 deltas with an :class:`Engine`; ``max_layer`` bounds what it may save."""

    kind: Kind = "v3"
    recipe = ENGINE_RECIPE

    def __init__(
        self,
        *,
        clock: IReactorTime,
        reactor_call: Callable[..., None],
        engine: Engine,
        upstream: Upstream,
        importer: LayerImporter,
        blobs: BlobStore,
        images: DeltaImages,
        pool: WorkerPool,
        threads: int,
        max_layer: int,
        job_seconds: float,
    ) -> None:
        """``reactor_call`` is the reactor's ``callFromThread``."""
        self._clock, self._reactor_call, self._engine, self._upstream = clock, reactor_call, engine, upstream
        self._importer, self._blobs, self._images, self._pool = importer, blobs, images, pool
        self._threads, self._max_layer, self._job_seconds = threads, max_layer, job_seconds

    async def build(
        self, pair: Pair, credentials: Credentials, report: Report, grows: Grows, *, frugal: bool = False
    ) -> DeltaRow:
        """Pull, let it build, save, prove and publish. Raises EngineUnavailable, EngineFailed and what the steps raise."""
        started = self._clock.seconds()
        report({"stage": "fetch"})
        base = await pair.base.config(self._upstream, credentials)
        target = await pair.target.config(self._upstream, credentials)
        common = common_prefix(base.diff_ids, target.diff_ids)
        if common == len(target.diff_ids):
            return await self._images.publish(pair, base, target, common, [], started)
        stem = self._blobs.temporary("")
        pinned: list[PinnedLayer] = []
        watch = Watch(lambda step: self._reactor_call(report, step))
        try:
            saved = await self._made(pair, credentials, stem, watch)
            diff_ids = _checked(saved, base, target, common)
            report({"stage": "fetch"})
            results = await settle(
                self._importer.ensure(layer, credentials) for layer in dict.fromkeys(wanted_layers(pair.base, base))
            )
            pinned = [result for result in results if isinstance(result, PinnedLayer)]
            failure = first_failure(results)
            if failure is not None:
                failure.raiseException()
            files = {pin.diff_id: pin for pin in pinned}
            result = await self._pool.run(
                {
                    "task": "adopt",
                    "base": [
                        {"diff_id": str(pin.diff_id), "path": str(pin.path), "size": pin.size}
                        for pin in (files[diff_id] for diff_id in base.diff_ids)
                    ],
                    "layers": [
                        {"path": str(path), "diff_id": str(diff_id), "target": str(wanted)}
                        for path, diff_id, wanted in zip(
                            saved.layers[common:], diff_ids[common:], target.diff_ids[common:], strict=True
                        )
                    ],
                    "out_dir": str(stem.parent),
                    "stem": stem.name,
                    "threads": 1 if frugal else self._threads,
                },
                seconds=self._job_seconds,
                progress=report,
            )
            return await self._images.publish(
                pair, base, target, common, result["layers"], started, builder="balena-engine"
            )
        except ProofFailed:
            await self._importer.drop(pin.diff_id for pin in pinned)
            raise
        finally:
            for pin in pinned:
                pin.release()
            for leftover in stem.parent.glob(f"{stem.name}-*"):
                leftover.unlink(missing_ok=True)

    async def _made(self, pair: Pair, credentials: Credentials, stem: Path, watch: Watch) -> SavedImage:
        """The delta image as files; the engine is left as it was."""
        engine, api = self._engine, self._engine.api
        held: list[ResolvedImage] = []
        tag = f"obdelta/{hashlib.sha256(str(pair.key).encode()).hexdigest()[:32]}:building"
        try:
            for image in (pair.base, pair.target):
                await engine.hold(image, credentials, watch)
                held.append(image)
            base, target = (image.manifest.config.digest for image in (pair.base, pair.target))
            try:
                made = await engine.call(watch, api.create_delta, base, target, tag, watch)
                return await engine.call(watch, api.save, made, stem, self._max_layer, watch)
            finally:
                await engine.remove(tag)
        finally:
            for image in held:
                await engine.release(image)


def _checked(saved: SavedImage, base: ImageConfig, target: ImageConfig, common: int) -> list[DiffID]:
    """The diff_ids of what the engine made, if it is the delta that was asked for; ProofFailed otherwise."""
    config = parse_config(saved.config, "the engine's delta image")
    inner = config.value.get("config")
    labels = inner.get("Labels") if isinstance(inner, dict) else None
    labels = labels if isinstance(labels, dict) else {}
    carried = labels.get(CONFIG_LABEL)
    same_base = labels.get(BASE_LABEL) == str(base.image_id)
    same_target = isinstance(carried, str) and carried.encode("utf-8", "surrogatepass") == target.raw
    empty = all(diff_id == EMPTY_LAYER_DIFF_ID for diff_id in config.diff_ids[:common])
    if same_base and same_target and empty and len(saved.layers) == len(config.diff_ids) == len(target.diff_ids):
        return list(config.diff_ids)
    raise ProofFailed("the engine's delta image", "it is not of these two images")
