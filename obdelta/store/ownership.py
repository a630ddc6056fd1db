"""Ownership of ``state-dir``: a marker file in it, and the names that obdelta gives to its own
files.

A directory without the marker is used only if it is empty. Inside, only names that obdelta gives
are ever removed. Everything else stays and is logged.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from twisted.logger import Logger

from obdelta.errors import SettingsError
from obdelta.store import files

log = Logger()

MARKER: Final = ".obdelta-state"
TEXT: Final = (
    b"This folder belongs to obdelta (setting state-dir): "
    b"it removes what it no longer needs here.\n"
)
APPLICATION_ID: Final = 0x6F62646C
"""``obdl``: distinguishes our catalogue from any other SQLite database."""
CATALOGUE: Final = "catalogue.sqlite"
KEY_BYTES: Final = 32
FOLDERS: Final = ("tmp", "layers", "trees", "upstream", "blobs", "blobs/sha256")
"""Directories whose contents obdelta removes: real directories, never links to other places."""

TEMPORARY: Final = re.compile(r"[0-9a-f]{24}(?:[.-][0-9A-Za-z.-]*)?|\.[0-9a-f]{16}", re.ASCII)
"""Names in ``tmp/``: see :func:`obdelta.store.files.unique_name`. The second form is a probe for
extended attributes.
"""
RUNNING: Final = re.compile(r"running-[0-9]{1,10}", re.ASCII)

_ALLOWED = {MARKER, "lost+found"}
_MAX_LISTED = 10
_SQLITE = b"SQLite format 3\0"
_ID_AT = 68
_WAL_HEADER, _FRAME_HEADER = 32, 24


@dataclass(frozen=True, slots=True)
class Claim:
    """A directory that belongs to obdelta. ``marked``: the marker was written now, into a directory
    of an older obdelta.
    """

    path: Path
    marked: bool
    mode: int

    def report(self) -> None:
        """Logs this for operators."""
        if self.marked:
            log.info(
                "state-dir {path} was made by an older obdelta: it is marked with {marker} now",
                path=str(self.path),
                marker=MARKER,
            )
        if self.mode & 0o007:
            log.warn(
                "other users may enter state-dir {path} (mode {mode:04o}): images and"
                " secret keys are in it: run chmod 700 {path}",
                path=str(self.path),
                mode=self.mode,
            )


def make(state_dir: Path) -> None:
    """Creates a directory with the marker in it. An existing directory stays unchanged."""
    files.make_directory(state_dir.parent)
    with contextlib.suppress(FileExistsError):
        state_dir.mkdir(0o700)
        files.sync_directory(state_dir.parent)
        mark(state_dir)


def make_folder(path: Path) -> None:
    """Creates a directory in ``state-dir`` again if it was removed; ``state-dir`` too, with its
    marker.
    """
    if path.is_dir():
        return
    if not path.parent.exists():
        make(path.parent)
    files.make_directory(path)


def claim(state_dir: Path) -> Claim:
    """Creates the directory, or checks that it is ours. Raises SettingsError for a directory that
    is not, and OSError.

    A directory is ours if it has the marker, is empty, or has the catalogue of an older obdelta.
    Nothing is changed in any other.
    """
    if not state_dir.exists():
        make(state_dir)
    marked, foreign = check(state_dir)
    if not marked:
        mark(state_dir)
    return Claim(state_dir, bool(not marked and foreign), stat.S_IMODE(state_dir.stat().st_mode))


def check(state_dir: Path) -> tuple[bool, set[str]]:
    """Returns whether the directory has the marker, and which names in it are not ours. Changes
    nothing. Raises SettingsError for a directory that is not obdelta's, and OSError.
    """
    if not state_dir.exists():
        return False, set()
    names = {path.name for path in state_dir.iterdir()}
    marked = MARKER in names
    foreign = {name for name in names - _ALLOWED if not _is_url_key(state_dir / name)}
    if marked:
        _check_marker(state_dir)
    elif foreign and not is_catalogue(state_dir / CATALOGUE):
        raise SettingsError(
            "state-dir",
            str(state_dir),
            f"an empty directory, or one that obdelta made; it holds {listing(foreign)}, and"
            f" nothing was touched: name another directory, or run `touch {state_dir / MARKER}` if"
            " this one is obdelta's",
        )
    _check_folders(state_dir)
    return marked, foreign


def mark(state_dir: Path) -> None:
    """Writes the marker durably if there is none."""
    try:
        descriptor = os.open(
            state_dir / MARKER,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
        )
    except FileExistsError:
        return
    # An empty marker counts too: a full disk must not keep a server from starting.
    with contextlib.suppress(OSError), os.fdopen(descriptor, "wb") as file:
        file.write(TEXT)
        file.flush()
        os.fsync(file.fileno())
    files.sync_directory(state_dir)


def _is_url_key(path: Path) -> bool:
    """Returns whether this is a key for download URLs.

    An operator may put one into a new directory: from a backup, or from another server.
    """
    status = path.lstat()
    return path.name == "url-key" and stat.S_ISREG(status.st_mode) and status.st_size == KEY_BYTES


def _check_marker(state_dir: Path) -> None:
    path = state_dir / MARKER
    if stat.S_ISREG(path.lstat().st_mode) and TEXT.startswith(path.read_bytes()[: len(TEXT)]):
        return
    raise SettingsError(
        "state-dir",
        str(state_dir),
        f"a directory in which obdelta made {MARKER}; this {MARKER} is something else",
    )


def _check_folders(state_dir: Path) -> None:
    for name in FOLDERS:
        path = state_dir / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise SettingsError(
                "state-dir",
                str(state_dir),
                f"a directory in which {name} is a real directory: move {path} away",
            )
    for name in ("reserve", "lock"):
        if (state_dir / name).is_symlink():
            raise SettingsError(
                "state-dir", str(state_dir), f"a directory in which {name} is no link: move it away"
            )


def is_catalogue(path: Path) -> bool:
    """Returns whether this is a catalogue of obdelta. Reads the file and its write-ahead log;
    SQLite itself would write beside it.

    Source: SQLite, "Database File Format", sections 1.3 and 4.
    """
    with contextlib.suppress(OSError), _regular(path) as file:
        head = file.read(_ID_AT + 4)
        if head[: len(_SQLITE)] != _SQLITE:
            return False
        return _is_catalogue_page(head) or _is_in_log(path.with_name(f"{path.name}-wal"))
    return False


def _is_catalogue_page(page: bytes) -> bool:
    return page[_ID_AT : _ID_AT + 4] == APPLICATION_ID.to_bytes(4, "big")


def _is_in_log(path: Path) -> bool:
    """Returns whether a first page in a write-ahead log is ours: a new database may have it only
    there.
    """
    with _regular(path) as file:
        header = file.read(_WAL_HEADER)
        size = int.from_bytes(header[8:12], "big")
        if header[:3] != b"\x37\x7f\x06" or not 512 <= size <= 65536:
            return False
        while len(frame := file.read(_FRAME_HEADER + size)) == _FRAME_HEADER + size:
            if frame[:4] == b"\0\0\0\1" and _is_catalogue_page(frame[_FRAME_HEADER:]):
                return True
    return False


def _regular(path: Path) -> BinaryIO:
    """Opens a regular file. OSError for anything else: reading a pipe would never end, and a link
    leads elsewhere.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise FileNotFoundError(path)


def listing(names: Iterable[str]) -> str:
    """Returns names for a log line: the first ten, and how many more there are."""
    found = sorted(names)
    text = ", ".join(
        name if name.isascii() and name.isprintable() else ascii(name)
        for name in found[:_MAX_LISTED]
    )
    return text if len(found) <= _MAX_LISTED else f"{text} and {len(found) - _MAX_LISTED} more"


def report_swept(folder: Path, removed: Iterable[str], left: Iterable[str] = ()) -> None:
    """Logs what a start removed from a directory, and which names there are not ours."""
    gone, foreign = list(removed), list(left)
    if gone:
        log.info(
            "start: {count} entries that an earlier run left in {folder}/ were removed: {names}",
            count=len(gone),
            folder=folder.name,
            names=listing(gone),
        )
    if foreign:
        log.warn(
            "start: {folder}/ holds {count} entries that obdelta did not make: {names}: they stay:"
            " move them away",
            count=len(foreign),
            folder=folder.name,
            names=listing(foreign),
        )
