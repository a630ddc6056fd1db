"""Images on a balena-engine for builds: pulled once for all of them, and removed with the last one.

Every name that the engine gets from us is recorded first. Leftovers of an engine that died or a
server that was killed are therefore removed later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.logger import Logger

from obdelta.builds.engine.api import EngineApi
from obdelta.builds.engine.saved_image import SavedImage, Watch
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.concurrency.tasks import Threads, shielded
from obdelta.errors import EngineFailed, EngineUnavailable, Unavailable
from obdelta.oci import Digest, Reference
from obdelta.registry import Credentials
from obdelta.store.catalogue.tables.engine_images import EngineImages

log = Logger()

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    """An image that builds need on the engine. ``pulled``: the name under which it was pulled for
    them.
    """

    lock: DeferredLock = field(default_factory=DeferredLock)
    users: int = 0
    there: bool = False
    pulled: str | None = None


class Engine:
    """Uses an engine from the reactor: calls run in their own threads, and each image is pulled
    once for all builds.

    ``host`` is the registry's name on the engine; ``names`` records image names.
    """

    def __init__(self, api: EngineApi, threads: Threads, host: str, names: EngineImages) -> None:
        self.api, self._threads, self._host, self._names = api, threads, host, names
        self._held: dict[Digest, _Held] = {}
        self._making: set[str] = set()
        self._cleanup = DeferredLock()

    async def call(
        self, watch: Watch, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a blocking call. Cancelling stops the watch, and ends only when the call has ended:
        it may own files.
        """
        work = self._threads.start(function, *args, **kwargs)
        try:
            return await shielded(work)
        except CancelledError:
            watch.stop()
            ended: Deferred[None] = Deferred()
            work.addBoth(lambda _: ended.callback(None))
            await ended
            raise

    async def availability_problem(self) -> str | None:
        """Returns why the engine cannot be reached, None when it answers (readiness)."""
        try:
            await self._threads.run(self.api.version)
        except (EngineUnavailable, EngineFailed) as error:
            return str(error)
        return None

    async def hold(self, image: ResolvedImage, credentials: Credentials, watch: Watch) -> None:
        """Returns once the engine has the image; :meth:`release` it later, unless this raises."""
        image_id = image.manifest.config.digest
        held = self._held.setdefault(image_id, _Held())
        held.users += 1
        try:
            await held.lock.acquire()
            try:
                if not held.there:
                    await self._ensure_pulled(held, image, credentials, watch)
            finally:
                held.lock.release()
        except BaseException:
            await self.release(image)
            raise

    async def _ensure_pulled(
        self, held: _Held, image: ResolvedImage, credentials: Credentials, watch: Watch
    ) -> None:
        image_id = image.manifest.config.digest
        if await self.call(watch, self.api.image_id, str(image_id)) is None:
            reference = Reference(self._host, image.repository, digest=image.manifest.digest)
            name = str(reference)
            await self._names.add(name, str(image_id))
            held.pulled = name
            await self.call(watch, self.api.pull, reference, credentials, watch)
            found = await self.call(watch, self.api.image_id, name)
            if found != image_id:
                raise EngineFailed(f"it pulled {found} instead of {image_id}")
        else:
            # It is there already: another user's image, or left by a build that was interrupted.
            names = (await self._names.all()).items()
            held.pulled = next((name for name, behind in names if behind == str(image_id)), None)
        held.there = True

    async def release(self, image: ResolvedImage) -> None:
        """Releases one build's hold. A pulled image is removed with the last one; one that was
        there before stays.
        """
        await self._release(image.manifest.config.digest)

    async def _release(self, image_id: Digest) -> None:
        held = self._held[image_id]
        held.users -= 1
        if held.users:
            return
        await held.lock.acquire()
        try:
            if held.users or self._held.get(image_id) is not held:
                return
            pulled, held.pulled, held.there = held.pulled, None, False
            if pulled is not None:
                await self._remove(pulled)
            # A build that arrived meanwhile waits for the lock, and pulls the image again.
            if not held.users:
                del self._held[image_id]
        finally:
            held.lock.release()

    async def delta(
        self, base: Digest, target: Digest, tag: str, stem: Path, limit: int, watch: Watch
    ) -> SavedImage:
        """Returns a delta image between two of the engine's images, as files (see
        :meth:`EngineApi.save`).

        The engine keeps nothing of it. During the call ``tag`` is its name on the engine; no two
        calls at a time may use the same one.
        """
        self._making.add(tag)
        try:
            await self._names.add(tag)
            try:
                made = await self.call(watch, self.api.create_delta, base, target, tag, watch)
                return await self.call(watch, self.api.save, made, stem, limit, watch)
            finally:
                await self._remove(tag)
        finally:
            self._making.discard(tag)

    async def remove_leftovers(self) -> None:
        """Removes what interrupted builds left on the engine, if it answers."""
        await self._cleanup.acquire()
        try:
            for name, image in (await self._names.all()).items():
                if image:
                    # As if one build had held it and now releases it.
                    held = self._held.setdefault(Digest.parse(image), _Held())
                    held.users += 1
                    held.pulled = held.pulled or name
                    await self._release(Digest.parse(image))
                elif name not in self._making and not await self._remove(name):
                    return
        finally:
            self._cleanup.release()

    async def _remove(self, name: str) -> bool:
        """Removes an image's name. Returns False, and logs it, if the engine is unavailable; the
        name stays recorded.
        """
        try:
            await self.call(Watch(), self.api.remove, name)
            await self._names.remove(name)
        except (EngineUnavailable, EngineFailed, Unavailable) as error:
            log.warn(
                "{name} was not removed from the engine: {reason}: it is removed later",
                name=name,
                reason=str(error),
            )
            return not isinstance(error, EngineUnavailable)
        return True
