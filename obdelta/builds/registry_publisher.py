"""``publish = registry``: pushes finished v3 deltas to the registry, from which devices pull them.

Deltas are named as open-balena-delta names them, so that each finds and uses what the other has
pushed. Only the registry records what it has. No copy of that is kept here, so a restart, or the
deletion of a release there, does no harm.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from obdelta.builds.publish_image import delta_tag
from obdelta.builds.service import Pair, Published
from obdelta.concurrency.single_flight import Shared
from obdelta.delta.image import BASE_LABEL, CONFIG_LABEL, EMPTY_LAYER_DIFF_ID
from obdelta.errors import ManifestUnknown, Missing, ObdeltaError, StillBuilding
from obdelta.oci import Manifest, Reference, common_prefix, parse_manifest
from obdelta.registry import Credentials, Upstream
from obdelta.registry.upload import Pushed, Pusher
from obdelta.store.blobs import BlobStore
from obdelta.store.catalogue.catalogue import Catalogue
from obdelta.store.catalogue.records import DeltaKey, DeltaRow

log = Logger()

KEEP_FOUND = 60.0
"""Seconds for which a delta that the registry had is not looked up again."""
KEEP_FAILURE = 60.0
"""Seconds after a failed push in which the delta is served from here, and no new push begins."""
MOST_PUSHES = 4
"""Pushes under way at a time: a registry that lost everything is not flooded when all devices
retry.
"""
_KEPT = 4096
_IMAGE = re.compile(r"v[0-9]+/([0-9a-f]{16,})", re.ASCII)

_Key = tuple[DeltaKey, str, str]


def registry_tag(pair: Pair) -> str:
    """Returns ``delta-`` and the first 16 hex digits of the base's repository, as open-balena-delta
    has it.

    Where the base's repository has no such name (``org/app``, ``v2/<hash>-1``), the digits come
    from a hash over both contents.
    """
    match = _IMAGE.fullmatch(pair.base.repository)
    return f"delta-{match[1][:16]}" if match is not None else delta_tag(pair.key)


@dataclass(slots=True, eq=False)
class _Push:
    """A push under way, and its waiters."""

    waiters: list[Deferred[Published | None]] = field(default_factory=list)
    task: Deferred[None] | None = None


class RegistryPublisher:
    """Finds deltas in the registry, and pushes them there, once per pair of repositories for all
    waiters.

    ``host`` is the registry's name for devices; ``credentials`` may push everywhere.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        pusher: Pusher,
        credentials: Credentials,
        host: str,
        blobs: BlobStore,
        catalogue: Catalogue,
        clock: IReactorTime,
        tag: Callable[[Pair], str] = registry_tag,
        others: bool = False,
    ) -> None:
        """``others``: other servers push, too; a delta that they pushed is not pushed again."""
        self._tag, self._others = tag, others
        self._upstream, self._pusher, self._credentials, self._host = (
            upstream,
            pusher,
            credentials,
            host,
        )
        self._blobs, self._catalogue, self._clock = blobs, catalogue, clock
        self._found: dict[_Key, tuple[float, Published]] = {}
        self._failed: dict[_Key, float] = {}
        self._pushing: dict[_Key, _Push] = {}
        self._slots = DeferredSemaphore(MOST_PUSHES)
        self._finding: Shared[_Key, Published | None] = Shared()
        self._closed = False

    async def find(self, pair: Pair) -> Published | None:
        """Returns the pair's delta if the registry has it: its labels name both images, and all of
        its blobs exist.

        Errors count as not found: a delta that is built then can be served from here.
        """
        key = _key(pair)
        if (published := self._known(key)) is not None:
            return published
        return await self._finding.do(key, lambda: self._find(key, pair))

    async def _find(self, key: _Key, pair: Pair) -> Published | None:
        name = Reference(self._host, pair.target.repository, self._tag(pair))
        try:
            found = await self._found_there(pair, name)
        except Missing:
            return None
        except ObdeltaError as error:
            log.warn(
                "the registry could not be asked for {name}: {reason}",
                name=str(name),
                reason=str(error),
            )
            return None
        if isinstance(found, str):
            log.info(
                "{name} is not what it should be and is made anew: {why}", name=str(name), why=found
            )
            return None
        await self._catalogue.count("publish.found")
        return self._keep(key, Published(pair, name, *_sizes(pair, found)))

    def _known(self, key: _Key) -> Published | None:
        until, published = self._found.get(key, (0.0, None))
        return published if until > self._clock.seconds() else None

    async def _found_there(self, pair: Pair, name: Reference) -> Manifest | str:
        """Returns the image behind ``name``, or the reason why it is not the pair's delta."""
        repository, credentials = pair.target.repository, self._credentials
        manifest = await self._upstream.manifest(repository, str(name.tag), credentials)
        if not isinstance(manifest, Manifest):
            return "it is an index"
        config = await self._upstream.config(repository, manifest.config, credentials)
        value = config.value.get("config")
        labels = value.get("Labels") if isinstance(value, dict) else None
        labels = labels if isinstance(labels, dict) else {}
        target = labels.get(CONFIG_LABEL)
        if labels.get(BASE_LABEL) != str(pair.base.manifest.config.digest):
            return "it starts from another base"
        if not isinstance(target, str) or _sha256(target) != pair.target.manifest.config.digest.hex:
            return "it leads to another target"
        if len(manifest.layers) != len(pair.target.manifest.layers):
            return "it has another number of layers than its target"
        if EMPTY_LAYER_DIFF_ID in config.diff_ids:
            return (
                "it has empty layers for what base and target share, which fail in host-OS updates"
            )
        for layer in dict.fromkeys(manifest.layers):
            if not await self._pusher.has_blob(repository, layer, credentials):
                return f"its layer {layer.digest} is gone"
        return manifest

    def begin(self, pair: Pair, row: DeltaRow) -> None:
        """Starts to push a delta, unless a push is under way or has failed a moment ago. Waits for
        nothing.
        """
        key = _key(pair)
        if self._known(key) is not None:
            return
        if (
            key not in self._pushing
            and not self._closed
            and self._failed.get(key, 0.0) <= self._clock.seconds()
        ):
            push = self._pushing[key] = _Push()
            push.task = ensureDeferred(self._push(key, push, pair, row))

    async def publish(self, pair: Pair, row: DeltaRow, deadline: float) -> Published | None:
        """Returns the delta in the registry, once it is there; None where the push failed (it is
        served from here then).

        Raises StillBuilding at ``deadline``. Cancelling ends the wait only.
        """
        self.begin(pair, row)
        push = self._pushing.get(_key(pair))
        if push is None:
            return self._known(_key(pair))
        waiter: Deferred[Published | None] = Deferred()
        push.waiters.append(waiter)
        left = max(0.0, deadline - self._clock.seconds())
        waiter.addTimeout(left, self._clock, onTimeoutCancel=_still_pushing)
        try:
            return await waiter
        finally:
            if waiter in push.waiters:
                push.waiters.remove(waiter)

    async def _push(self, key: _Key, push: _Push, pair: Pair, row: DeltaRow) -> None:
        name = Reference(self._host, pair.target.repository, self._tag(pair))
        started = self._clock.seconds()
        published: Published | None = None
        done: Pushed | None = None
        try:
            published = await self.find(pair) if self._others else None
            if published is None:
                done = await self._slots.run(
                    lambda: ensureDeferred(self._send(pair, row, str(name.tag)))
                )
        except ObdeltaError as error:
            log.warn(
                "{name} could not be pushed, it is served from here: {reason}",
                name=str(name),
                reason=str(error),
            )
        except CancelledError:
            log.info("the push of {name} was called off", name=str(name))
        except Exception:
            log.failure("the push of {name} met an unexpected error", name=str(name))
        if done is not None:
            published = self._keep(key, Published(pair, name, row.full_bytes, row.delta_bytes))
            log.info(
                "pushed {name}: sent={sent} bytes={bytes} mounted={mounted} present={present}"
                " seconds={seconds:.2f}",
                name=str(name),
                sent=done.sent,
                bytes=done.sent_bytes,
                mounted=done.mounted,
                present=done.present,
                seconds=self._clock.seconds() - started,
            )
        if published is None:
            _bound(self._failed)
            self._failed[key] = self._clock.seconds() + KEEP_FAILURE
            await self._catalogue.count("publish.failed")
        elif done is not None:
            await self._catalogue.count("publish.pushed")
        del self._pushing[key]
        for waiter in push.waiters[:]:
            waiter.callback(published)

    async def _send(self, pair: Pair, row: DeltaRow, tag: str) -> Pushed:
        repository = pair.target.repository
        kept = await self._catalogue.manifest(repository, row.content)
        if kept is None:
            raise ManifestUnknown(repository, str(row.content))
        manifest = parse_manifest(kept.raw, kept.media_type)
        if not isinstance(manifest, Manifest):
            raise AssertionError("what was published is the manifest of one image")
        with ExitStack() as pins:
            for descriptor in (manifest.config, *manifest.layers):
                pins.enter_context(self._blobs.pin(descriptor.digest))
            return await self._pusher.push(
                repository,
                tag,
                manifest,
                self._blobs.path,
                self._credentials,
                # The same contents under another name: the layers are in the repository of the
                # first push.
                mount_from=[row.target_repository] if row.target_repository != repository else [],
            )

    def _keep(self, key: _Key, published: Published) -> Published:
        _bound(self._found)
        self._found[key] = (self._clock.seconds() + KEEP_FOUND, published)
        return published

    async def close(self) -> None:
        """Cancels every push and waits until all have ended."""
        self._closed = True
        for push in list(self._pushing.values()):
            if push.task is not None:
                push.task.cancel()
                await push.task


def _key(pair: Pair) -> _Key:
    return pair.key, pair.base.repository, pair.target.repository


def _sizes(pair: Pair, delta: Manifest) -> tuple[int, int]:
    """Returns the bytes of a full pull and of the delta, without the layers that both images begin
    with.
    """
    base, target = pair.base.manifest, pair.target.manifest
    shared = common_prefix(
        (layer.digest for layer in base.layers), (layer.digest for layer in target.layers)
    )
    full, small = (
        one.config.size + sum(layer.size for layer in one.layers[shared:])
        for one in (target, delta)
    )
    return full, small


def _sha256(text: str) -> str:
    # A lone surrogate out of JSON has no bytes that could be an image's config.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _bound(
    kept: dict[_Key, object] | dict[_Key, float] | dict[_Key, tuple[float, Published]],
) -> None:
    while len(kept) >= _KEPT:
        del kept[next(iter(kept))]


def _still_pushing(result: object, _timeout: float) -> Published | None:
    if isinstance(result, Failure) and result.check(CancelledError):
        raise StillBuilding
    return result  # type: ignore[return-value] # what the waiter was given
