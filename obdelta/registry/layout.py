"""The embedded upstream ``oci:DIR``: ``DIR/<repository>/`` are OCI image layouts.

Source: OCI image specification, ``image-layout.md``. A layout's tags are its index's ``org.opencontainers.image.ref.name``
annotations; only manifests that ``index.json`` leads to are served as manifests. No file outside of DIR is opened, whatever
symbolic links say, and nothing but regular files.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Lock

from obdelta.errors import BlobUnknown, DigestMismatch, ManifestInvalid, ManifestUnknown, NameUnknown, SizeMismatch
from obdelta.oci import Descriptor, Digest, Index, Manifest, parse_manifest
from obdelta.oci.manifest import INDEX_TYPES, MAX_MANIFEST, load_json, parse_descriptor
from obdelta.oci.reference import is_repository, is_tag
from obdelta.registry.credentials import Credentials
from obdelta.registry.layout_relay import LayoutRelay
from obdelta.registry.threads import Threads
from obdelta.registry.upstream import RelayRequest, RelayResponse, Sink

_REF_NAME = "org.opencontainers.image.ref.name"
_BATCH = 256 * 1024


class SharedFile:
    """An open file that threads read, one at a time, and that may be closed at any moment: a read in progress ends first.

    Without that, closing could hand the descriptor's number to another file under the feet of the read.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size = os.fstat(descriptor).st_size
        self._lock = Lock()
        self._reading, self._closed = Event(), Event()

    def seek(self, offset: int) -> None:
        """Where the next read begins; only before the first."""
        self._file.seek(offset)

    def read(self, most: int) -> bytes:
        """The next bytes, ``b""`` at the end and after closing."""
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
        """May be called more than once, from any thread; never waits."""
        with self._lock:
            if not self._reading.is_set():
                self._file.close()
            self._closed.set()


class LayoutFiles:
    """The layouts on disk; everything here blocks."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def tags(self, repository: str) -> list[str]:
        """In order of their names. Raises NameUnknown, ManifestInvalid."""
        return sorted({name for name, _ in self._entries(repository) if name is not None})

    def manifest(self, repository: str, selector: str) -> Manifest | Index:
        """By tag or digest. Raises NameUnknown, ManifestUnknown, ManifestInvalid, DigestMismatch, SizeMismatch."""
        found = self._find(repository, selector)
        if found is None:
            raise ManifestUnknown(repository, selector)
        try:
            return self._read(repository, found)
        except BlobUnknown as error:
            raise ManifestUnknown(repository, selector) from error

    def open_blob(self, repository: str, digest: Digest) -> SharedFile:
        """The file, not verified; the caller closes it. Raises NameUnknown, BlobUnknown."""
        layout = self._layout(repository)
        opened = self._open(layout / "blobs" / "sha256" / digest.hex)
        if opened is None:
            raise BlobUnknown(digest)
        return opened

    def _find(self, repository: str, selector: str) -> Descriptor | None:
        entries = list(self._entries(repository))
        if not selector.startswith("sha256:"):
            return next((entry for name, entry in entries if name == selector), None)
        for _, entry in entries:
            if str(entry.digest) == selector:
                return entry
        for _, entry in entries:
            if entry.media_type in INDEX_TYPES:
                index = self._read(repository, entry)
                nested = [child.descriptor for child in index.entries] if isinstance(index, Index) else []
                for child in nested:
                    if str(child.digest) == selector:
                        return child
        return None

    def _entries(self, repository: str) -> Iterator[tuple[str | None, Descriptor]]:
        """What ``index.json`` lists: tags (or None) and what they stand for."""
        what = f"the index of {repository}"
        opened = self._open(self._layout(repository) / "index.json")
        if opened is None:
            raise NameUnknown(repository)
        with closing(opened):
            raw = opened.read(MAX_MANIFEST + 1)
        if len(raw) > MAX_MANIFEST:
            raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
        manifests = load_json(raw, what).get("manifests")
        if not isinstance(manifests, list):
            raise ManifestInvalid(what, "it has no list of manifests")
        for entry in manifests:
            descriptor = parse_descriptor(entry, what)
            annotations = entry.get("annotations")
            name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
            yield (name if isinstance(name, str) and is_tag(name) else None), descriptor

    def _read(self, repository: str, descriptor: Descriptor) -> Manifest | Index:
        what = f"manifest {descriptor.digest} of {repository}"
        with closing(self.open_blob(repository, descriptor.digest)) as opened:
            if opened.size > MAX_MANIFEST:
                raise ManifestInvalid(what, f"it is larger than {MAX_MANIFEST} bytes")
            raw = opened.read(MAX_MANIFEST + 1)
        if len(raw) != descriptor.size:
            raise SizeMismatch(descriptor.size, len(raw), what)
        actual = Digest.of(raw)
        if actual != descriptor.digest:
            raise DigestMismatch(descriptor.digest, actual, what)
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
        """A regular file that lies under the root, all links followed; None where there is no such."""
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self._root):
                return None
            # Not to hang on a FIFO, not to follow a link that was put there just now.
            descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, RuntimeError, ValueError):
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        return SharedFile(descriptor)


class LayoutUpstream:
    """An :class:`obdelta.registry.upstream.Upstream` on a folder. Whoever asks may have everything that is in it."""

    def __init__(self, root: Path, threads: Threads) -> None:
        self._files, self._threads = LayoutFiles(root), threads
        self._relay = LayoutRelay(self._files, threads)

    async def manifest(self, repository: str, selector: str, credentials: Credentials) -> Manifest | Index:
        """See :meth:`obdelta.registry.upstream.Upstream.manifest`."""
        return await self._threads.run(self._files.manifest, repository, selector)

    async def small_blob(self, repository: str, descriptor: Descriptor, credentials: Credentials, limit: int) -> bytes:
        """See :meth:`obdelta.registry.upstream.Upstream.small_blob`."""
        if descriptor.size > limit:
            raise ManifestInvalid(f"blob {descriptor.digest}", f"its {descriptor.size} bytes are over {limit}")
        return await self._threads.run(self._small_blob, repository, descriptor)

    def _small_blob(self, repository: str, descriptor: Descriptor) -> bytes:
        with closing(self._files.open_blob(repository, descriptor.digest)) as opened:
            _check_size(descriptor, opened.size)
            content = opened.read(descriptor.size)
        _check_digest(descriptor, Digest.of(content))
        return content

    async def blob(self, repository: str, descriptor: Descriptor, credentials: Credentials, sink: Sink) -> None:
        """See :meth:`obdelta.registry.upstream.Upstream.blob`."""
        opened = await self._threads.run(self._files.open_blob, repository, descriptor.digest)
        hasher = hashlib.sha256()

        def read_and_hash() -> bytes:
            batch = opened.read(_BATCH)
            hasher.update(batch)
            return batch

        with closing(opened):
            _check_size(descriptor, opened.size)
            received = 0
            while batch := await self._threads.run(read_and_hash):
                received += len(batch)
                if received > descriptor.size:
                    break
                await sink.write(batch)
        _check_size(descriptor, received)
        _check_digest(descriptor, Digest(hasher.hexdigest()))

    async def relay(self, request: RelayRequest) -> RelayResponse:
        """See :meth:`obdelta.registry.upstream.Upstream.relay`."""
        return await self._relay.answer(request)

    async def close(self) -> None:
        """Nothing stays open."""


def _check_size(descriptor: Descriptor, actual: int) -> None:
    if actual != descriptor.size:
        raise SizeMismatch(descriptor.size, actual, f"blob {descriptor.digest}")


def _check_digest(descriptor: Descriptor, actual: Digest) -> None:
    if actual != descriptor.digest:
        raise DigestMismatch(descriptor.digest, actual, "blob")
