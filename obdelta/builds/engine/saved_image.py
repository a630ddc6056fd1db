"""Images as balena-engine saves them: unpacked from the tar of ``docker save``. Blocking."""

from __future__ import annotations

import json
import posixpath
import tarfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from obdelta.errors import Cancelled, EngineFailed
from obdelta.oci.manifest import MAX_CONFIG

_READ = 1024 * 1024


class Watch:
    """Lets a blocking call report progress, and lets others ask it to stop.

    ``progress`` is called in the call's thread.
    """

    def __init__(
        self, progress: Callable[[Mapping[str, object]], None] = lambda _step: None
    ) -> None:
        self.progress = progress
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Makes the call raise Cancelled when the engine next sends something. From any thread."""
        self._stopped.set()

    def check(self) -> None:
        """Raises Cancelled after :meth:`stop`."""
        if self._stopped.is_set():
            raise Cancelled("no client waits for this build any more")


@dataclass(frozen=True, slots=True)
class SavedImage:
    """A saved image. ``config`` holds the bytes that the image ID hashes.

    ``layers`` are uncompressed tars, bottom to top (several may be the same file).
    """

    config: bytes
    layers: tuple[Path, ...]


def unpack(source: Any, stem: Path, limit: int, watch: Watch) -> SavedImage:
    """Unpacks what ``docker save`` writes: files under any names, and ``manifest.json``, which
    lists their roles.
    """
    found: dict[str, Path] = {}
    links: dict[str, str] = {}
    left = limit
    with tarfile.open(fileobj=source, mode="r|", bufsize=_READ) as tar:
        for number, member in enumerate(tar):
            watch.check()
            name = posixpath.normpath(member.name)
            if member.issym():
                links[name] = posixpath.normpath(
                    posixpath.join(posixpath.dirname(name), member.linkname)
                )
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.isfile():
                left -= member.size
                if left < 0:
                    raise EngineFailed(f"the saved image has more than {limit} bytes")
                # Files get names of our own: an engine's names must not lead out of the directory.
                found[name] = stem.with_name(f"{stem.name}-{number}.saved")
                with found[name].open("wb") as out:
                    content = cast(Any, tar.extractfile(member))
                    while chunk := content.read(_READ):
                        watch.check()
                        out.write(chunk)

    def place(name: object) -> Path:
        path = posixpath.normpath(str(name))
        file = found.get(path) or found.get(links.get(path, ""))
        if file is None:
            raise EngineFailed("the saved image lacks a file that it names")
        return file

    try:
        (entry,) = json.loads(_small(place("manifest.json")))
        config, layers = place(entry["Config"]), tuple(place(layer) for layer in entry["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineFailed("the saved image has no valid manifest.json") from error
    return SavedImage(_small(config), layers)


def _small(path: Path) -> bytes:
    if path.stat().st_size > MAX_CONFIG:
        raise EngineFailed("the saved image has a config that is too large")
    return path.read_bytes()
