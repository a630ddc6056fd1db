"""The embedded upstream ``oci:DIR``: each ``DIR/<repository>/`` is an OCI image layout, read from
disk.

Source: OCI image specification, ``image-layout.md``. A layout's tags come from the annotations of
its index: plain tags, and those of full image names, as podman, docker and containerd write them.
Only manifests listed in ``index.json``, directly or through an index, are served as manifests. No
file outside of DIR is opened, whatever symbolic links say, and nothing but regular files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Lock

from obdelta.concurrency.tasks import Threads
from obdelta.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    UpstreamUnavailable,
)
from obdelta.oci import (
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    parse_config,
    parse_manifest,
)
from obdelta.oci.manifest import (
    INDEX_TYPES,
    MAX_CONFIG,
    MAX_MANIFEST,
    is_artifact,
    load_json,
    parse_descriptors,
)
from obdelta.oci.reference import is_repository
from obdelta.registry.auth.credentials import Credentials
from obdelta.registry.layouts.layout_tags import LayoutEntry, find_tag, parse_name
from obdelta.registry.layouts.oci_layout_http import LayoutRelay
from obdelta.registry.upstream import ProxiedRequest, ProxiedResponse, Sink

_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
"""Annotations that hold a tag, or a full image name."""
_MAX_NESTED = 4
_BATCH = 256 * 1024


class SharedFile:
    """An open file that threads read, one at a time. Closing it at any moment lets a read in
    progress end first.

    Otherwise the descriptor's number could pass to another file during the read.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = os.fstat(descriptor).st_size
        self._lock = Lock()
        self._reading, self._closed = Event(), Event()

    def seek(self, offset: int) -> None:
        """Sets where the next read begins; only before the first read."""
        self._file.seek(offset)

    def read(self, most: int) -> bytes:
        """Returns the next bytes, ``b""`` at the end and after closing."""
        with self._lock:
            if self._closed.is_set():
                return b""
            self._reading.set()
        try:
            return self._file.read(most)
        finally:
            with self._lock:
                self._reading.clear()
                if self._closed.is_set():
                    self._file.close()

    def close(self) -> None:
        """Closes the file. May be called more than once, from any thread; never waits."""
        with self._lock:
            if not self._reading.is_set():
                self._file.close()
            self._closed.set()


class LayoutFiles:
    """The layouts on disk; everything here blocks."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def tags(self, repository: str) -> list[str]:
        """Returns the tags, sorted by name. Raises NameUnknown, ManifestInvalid."""
        return sorted({name.tag for entry in self._entries(repository) for name in entry.names})

    def manifest(self, repository: str, selector: str) -> Manifest | Index:
        """Returns a manifest by tag or digest.

        Raises NameUnknown, ManifestUnknown, ManifestInvalid; UpstreamUnavailable for a damaged
        file.
        """
        try:
            return self._read(repository, self._find(repository, selector))
        except BlobUnknown as error:
            raise ManifestUnknown(repository, selector) from error

    def open_blob(self, repository: str, digest: Digest) -> SharedFile:
        """Returns the open file, not verified; the caller closes it. Raises NameUnknown,
        BlobUnknown.
        """
        layout = self._layout(repository)
        opened = self._open(layout / "blobs" / "sha256" / digest.hex)
        if opened is None:
            raise BlobUnknown(digest)
        return opened

    def _find(self, repository: str, selector: str) -> Descriptor:
        entries = list(self._entries(repository))
        if not selector.startswith("sha256:"):
            return find_tag(repository, selector, entries)
        todo = [(entry.descriptor, 0) for entry in entries]
        for descriptor, depth in todo:
            if str(descriptor.digest) == selector:
                return descriptor
            if descriptor.media_type in INDEX_TYPES and depth < _MAX_NESTED:
                index = self._read(repository, descriptor)
                todo += (
                    [(child.descriptor, depth + 1) for child in index.entries]
                    if isinstance(index, Index)
                    else []
                )
        raise ManifestUnknown(repository, selector)

    def _entries(self, repository: str) -> Iterator[LayoutEntry]:
        """Yields what ``index.json`` lists."""
        what = f"the index of {repository}"
        opened = self._open(self._layout(repository) / "index.json")
        if opened is None:
            raise NameUnknown(repository)
        with closing(opened):
            raw = opened.read(MAX_MANIFEST + 1)
        if len(raw) > MAX_MANIFEST:
            raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
        for descriptor, value in parse_descriptors(load_json(raw, what).get("manifests"), what):
            annotations = value.get("annotations")
            found = (
                [annotations.get(name) for name in _NAMES] if isinstance(annotations, dict) else []
            )
            yield LayoutEntry(
                descriptor,
                tuple(filter(None, map(parse_name, found))),
                is_artifact(descriptor, value),
            )

    def _read(self, repository: str, descriptor: Descriptor) -> Manifest | Index:
        what = f"manifest {descriptor.digest} of {repository}"
        with closing(self.open_blob(repository, descriptor.digest)) as opened:
            if opened.size > MAX_MANIFEST:
                raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
            raw = opened.read(MAX_MANIFEST + 1)
        _check_digest(descriptor, Digest.of(raw))
        return parse_manifest(raw, descriptor.media_type, what)

    def _layout(self, repository: str) -> Path:
        if not is_repository(repository):
            raise NameUnknown(repository[:80])
        layout = self._root / repository
        marker = self._open(layout / "oci-layout")
        if marker is None:
            raise NameUnknown(repository)
        marker.close()
        return layout

    def _open(self, path: Path) -> SharedFile | None:
        """Opens a regular file under the root, with all links resolved; None if there is none."""
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self._root):
                return None
            # Must not hang on a FIFO, nor follow a link that was created just now.
            descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, RuntimeError, ValueError):
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        return SharedFile(descriptor)


class LayoutUpstream:
    """An :class:`obdelta.registry.upstream.Upstream` on a directory. Every client may pull
    everything in it.
    """

    def __init__(self, root: Path, threads: Threads) -> None:
        self._files, self._threads = LayoutFiles(root), threads
        self._relay = LayoutRelay(self._files, threads)

    async def manifest(
        self, repository: str, selector: str, credentials: Credentials
    ) -> Manifest | Index:
        """See :meth:`obdelta.registry.upstream.Upstream.manifest`."""
        return await self._threads.run(self._files.manifest, repository, selector)

    async def small_blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int
    ) -> bytes:
        """See :meth:`obdelta.registry.upstream.Upstream.small_blob`."""
        if descriptor.size > limit:
            raise ManifestInvalid(
                f"blob {descriptor.digest}", f"its {descriptor.size} bytes are over {limit}"
            )
        return await self._threads.run(self._small_blob, repository, descriptor, limit)

    def _small_blob(self, repository: str, descriptor: Descriptor, limit: int) -> bytes:
        with closing(self._files.open_blob(repository, descriptor.digest)) as opened:
            if opened.size > limit:
                raise ManifestInvalid(
                    f"blob {descriptor.digest}", f"its {opened.size} bytes are over {limit}"
                )
            content = opened.read(limit)
        _check_digest(descriptor, Digest.of(content))
        return content

    async def config(
        self, repository: str, descriptor: Descriptor, credentials: Credentials
    ) -> ImageConfig:
        """See :meth:`obdelta.registry.upstream.Upstream.config`."""
        raw = await self.small_blob(repository, descriptor, credentials, MAX_CONFIG)
        return await self._threads.run(parse_config, raw, f"config of {repository}")

    async def blob_size(
        self, repository: str, digest: Digest, credentials: Credentials, *, patient: bool = True
    ) -> int | None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob_size`."""
        with closing(await self._threads.run(self._files.open_blob, repository, digest)) as opened:
            return opened.size

    async def blob(
        self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink
    ) -> None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob`."""
        opened = await self._threads.run(self._files.open_blob, repository, descriptor.digest)
        hasher = hashlib.sha256()

        def read_and_hash() -> bytes:
            batch = opened.read(_BATCH)
            hasher.update(batch)
            return batch

        with closing(opened):
            while batch := await self._threads.run(read_and_hash):
                await sink.write(batch)
        _check_digest(descriptor, Digest(hasher.hexdigest()))

    async def relay(self, request: ProxiedRequest) -> ProxiedResponse:
        """See :meth:`obdelta.registry.upstream.Upstream.relay`."""
        return await self._relay.answer(request)

    async def close(self) -> None:
        """Does nothing: no file stays open."""


def _check_digest(descriptor: Descriptor, actual: Digest) -> None:
    """Checks only the digest; sizes in manifests may be wrong, and engines ignore them."""
    if actual != descriptor.digest:
        raise UpstreamUnavailable(
            f"the file of {descriptor.digest} in the layout is damaged: restore it"
        )
