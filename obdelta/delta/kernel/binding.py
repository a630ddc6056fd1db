"""The C kernel's Python binding: files mapped into memory, the base made of them, and memory
management.

The kernel's contract is in ``kernel.h``. Calls release the GIL. Objects that the kernel allocates
are freed with the Python object that holds them.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from obdelta.delta.kernel._kernel_cffi import ffi as _ffi
from obdelta.delta.kernel._kernel_cffi import lib as _lib
from obdelta.oci import DiffID

ffi: Any = _ffi
lib: Any = _lib

NONE: int = lib.OD_NONE


class LayerFile(NamedTuple):
    """An uncompressed layer tar on disk; ``size`` in bytes."""

    diff_id: DiffID
    path: Path
    size: int


class MappedFile:
    """A file's bytes, read-only in memory. ``at`` is a C pointer, valid until :meth:`close`."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = file.seek(0, 2)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        # An empty file is never read, but C expects a pointer that belongs to nothing else.
        self._buffer = ffi.from_buffer(
            "uint8_t[]", self._map if self._map is not None else bytearray(8)
        )
        self.at = self._buffer

    def forget(self, start: int = 0, end: int | None = None) -> None:
        """Releases pages that were read, all or those of a range; they are read again when needed
        (the system keeps them).
        """
        if self._map is not None:
            start = start // mmap.PAGESIZE * mmap.PAGESIZE
            end = self.size if end is None else end
            if end > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Unmaps the file. Nothing may read ``at`` any more."""
        ffi.release(self._buffer)
        if self._map is not None:
            self._map.close()


class Base:
    """The base's address space: several mapped files, bottom to top. A context manager."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files: list[MappedFile] = []
        self.starts: list[int] = []
        self.size = 0
        try:
            for path in paths:
                file = MappedFile(path)
                self.files.append(file)
                self.starts.append(self.size)
                self.size += file.size
        except BaseException:
            self.close()
            raise
        self._layers = ffi.new("od_layer[]", max(1, len(self.files)))
        for layer, file, start in zip(self._layers, self.files, self.starts, strict=False):
            layer.at, layer.size, layer.start = file.at, file.size, start
        self.c = ffi.new(
            "od_base *", {"layers": self._layers, "count": len(self.files), "size": self.size}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def forget(self) -> None:
        """Releases the pages of all files; see :meth:`MappedFile.forget`."""
        for file in self.files:
            file.forget()

    def close(self) -> None:
        """Unmaps all files."""
        for file in self.files:
            file.close()
        self.files = []


@contextmanager
def waited_for(futures: Collection[Future[Any]]) -> Iterator[None]:
    """Cancels the futures and waits for the running ones at the end, also after an error: memory
    that their threads read may be unmapped then.
    """
    try:
        yield
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def owned(pointer: Any, free: Any) -> Any:
    """Returns a kernel object, freed with its last reference. Raises MemoryError for NULL."""
    if pointer == ffi.NULL:
        raise MemoryError
    return ffi.gc(pointer, free)


def checked(result: int) -> int:
    """Returns a result that is not negative. Raises MemoryError otherwise, the only error of such
    functions.
    """
    if result < 0:
        raise MemoryError
    return result
