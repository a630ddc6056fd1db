"""v2 delta streams: the header, rsync's arguments, and rsync's batch in a form that devices' rsync
can read.

The stream is ``{"version":2,"dockerConfig":{…}}``, a NUL byte, and a batch as ``rsync
--only-write-batch`` writes it. rsync is run so that readers from 3.1.1 on accept its batches
(``docs/v2.md`` gives the reasons):

- protocol 31, and a remote shell that starts rsync with fewer capabilities
  (:mod:`obdelta.rsync.remote_shell`);
- ``--numeric-ids``, so that no user name of this machine gets into the batch. Readers without that
  option then expect two empty lists of names after the file list: :class:`Recording` adds them;
- a fixed checksum seed. The numbers at the end that differ from run to run are set to zero.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from obdelta.errors import BatchInvalid
from obdelta.rootfs.delay import TOKENS, delay_record
from obdelta.rsync import varint
from obdelta.rsync.file_list import FileList
from obdelta.rsync.file_records import Transfers

PROTOCOL = 31
COMPATIBILITY = 0x0E
"""One byte in the header: symlink times, symlink iconv, safe file list. More flags would make it
two bytes, which 3.1 misreads.
"""
SEED = 1
STREAM_FLAGS = 0x1FF
"""recurse, owner, group, links, devices, hard links, checksum, dirs, compress: the options that the
reader turns on by itself.
"""

_ID_LISTS = b"\0\0"
_DONES = b"\0\0\0"
_TIMES = 7
"""Bytes at the end: two times of three bytes, and a last NDX_DONE."""
_MIN_NUMBER_LENGTH = 3
"""Bytes of the shortest of the numbers at the end."""
_HELD = len(_DONES) + 3 * 9 + _TIMES


_SENT = re.compile(rb"sent ([0-9]+) [0-9a-f]+ (.+)\n", re.DOTALL)
_ESCAPE = re.compile(rb"\\#([0-3][0-7]{2})")


class ReportedFile(NamedTuple):
    """A file that rsync reports as sent: ``size`` in bytes, and its path below the tree's root."""

    size: int
    name: bytes


def parse_sent_file(line: bytes) -> ReportedFile | None:
    """Parses a line of rsync's output. Returns None unless it reports a file whose content was
    sent.

    ``sent SIZE LINK CHECKSUM NAME``: only files have a checksum, and hard links have `` => NAME``
    before it (except those that differ only in attributes:
    :class:`obdelta.rsync.file_records.Transfer`). Unprintable bytes are escaped (``\\#012``).
    """
    match = _SENT.fullmatch(line)
    if match is None:
        return None
    return ReportedFile(
        int(match[1]), _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), match[2])
    )


class Tuning(NamedTuple):
    """``level`` of zlib, and ``block`` in bytes (0: rsync's own choice)."""

    level: int = 6
    block: int = 512


DEFAULT_TUNING = Tuning()


def stream_header(docker_config: Mapping[str, Any] | None) -> bytes:
    """Returns the bytes before the batch, with the NUL byte."""
    value = {"version": 2, "dockerConfig": docker_config}
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\0"


def record_command(
    batch: Path,
    target: Path,
    remote_side: tuple[str, ...],
    tuning: Tuning = DEFAULT_TUNING,
    rsync: str = "rsync",
) -> list[str]:
    """Returns rsync's arguments for a batch that turns the base into ``target``. The command
    ``remote_side`` knows the base.

    rsync writes a shell script beside ``batch``, too. All arguments of open-balena-delta are
    included.
    """
    if any(set(part) & set("\"'") for part in remote_side):
        raise ValueError("rsync cannot quote quotes")
    return [
        rsync,
        *(
            "--archive",
            "--compress",
            "--checksum",
            "--no-inc-recursive",
            "--delete",
            "--hard-links",
        ),
        *("--one-file-system", f"--compress-level={tuning.level}"),
        *((f"--block-size={tuning.block}",) if tuning.block else ()),
        *("--fake-super", "--remote-option=--fake-super", "--numeric-ids"),
        *("--outbuf=L", "--out-format=sent %l%L %C %n"),
        *(f"--protocol={PROTOCOL}", f"--checksum-seed={SEED}", f"--only-write-batch={batch}"),
        "--rsh=" + " ".join(f'"{part}"' for part in remote_side),
        f"{target}/",
        "base:/",
    ]


def apply_command(tree: Path, rsync: str = "rsync") -> list[str]:
    """Returns rsync's arguments to apply a batch from standard input to a tree with
    ``--fake-super`` attributes, as a device does.

    Holes stay holes: a layer of a few bytes may hold a file with hundreds of gigabytes of holes.
    """
    return [
        rsync,
        "--archive",
        "--delete",
        "--sparse",
        "--fake-super",
        "--read-batch=-",
        f"{tree}/",
    ]


class Header(NamedTuple):
    """The header of a batch."""

    flags: int
    protocol: int
    compatibility: int
    seed: int

    @classmethod
    def decode(cls, batch: bytes | bytearray) -> tuple[Header, int]:
        """Returns the header and its length. Raises IndexError when there are too few bytes yet."""
        flags, at = varint.read_int(batch, 0)
        protocol, at = varint.read_int(batch, at)
        compatibility, at = varint.read_varint(batch, at) if protocol >= 30 else (0, at)
        seed, at = varint.read_int(batch, at)
        return cls(flags, protocol, compatibility, seed), at


EXPECTED = Header(STREAM_FLAGS, PROTOCOL, COMPATIBILITY, SEED)


class Recording:
    """Converts a batch on its way from rsync to the device: any chunking in, bytes for the device
    out.

    Raises BatchInvalid as soon as something is not as expected. ``entries`` and ``size`` (bytes of
    all files and links) describe the target tree, and are known when ``listed`` is true. ``head``
    is the number of bytes before the batch's records, which ``transfers`` reads. ``tail``, known
    after :meth:`finish`, is where :mod:`~obdelta.rsync.no_op_padding` may be inserted, in bytes
    before the end of the whole.
    """

    def __init__(self) -> None:
        self.listed = False
        self.head = 0
        self.tail = 0
        self.transfers = Transfers()
        self._files = FileList()
        self._header: Header | None = None
        self._pending = bytearray()

    @property
    def entries(self) -> int:
        """The number of entries of the target tree."""
        return self._files.entries

    @property
    def size(self) -> int:
        """Bytes in all files and symbolic links of the target tree."""
        return self._files.size

    def feed(self, chunk: bytes) -> bytes:
        """Takes a chunk and returns the bytes that may be sent now."""
        self._pending += chunk
        out = b""
        if self._header is None:
            try:
                self._header, length = Header.decode(self._pending)
            except IndexError:
                return b""
            except ValueError as error:
                raise BatchInvalid(f"rsync began it with {error}") from error
            if self._header != EXPECTED:
                raise BatchInvalid(
                    f"rsync began it with {self._header}, which older readers refuse or misread"
                )
            out = self._take(length)
        if not self.listed:
            used, self.listed = self._files.feed(self._pending)
            out += self._take(used)
            if self.listed:
                out += _ID_LISTS
            self.head += len(out)
            if not self.listed:
                return out
        records = self._take(max(0, len(self._pending) - _HELD))
        self.transfers.feed(records)
        return out + records

    def finish(self) -> bytes:
        """Returns the last bytes. Three NDX_DONE, five numbers and an NDX_DONE close every batch.

        Only the third number depends on the trees. The others (bytes that both sides exchanged, and
        times) differ from run to run, and become zero.
        """
        if not self.listed:
            raise BatchInvalid("it ends within its list of files")
        self.transfers.feed(bytes(self._pending))
        stats, size = self._stats_at()
        end = bytes(2 * _MIN_NUMBER_LENGTH) + bytes(self._pending[size:-_TIMES]) + bytes(_TIMES)
        # Right before the last NDX_DONE that rsync's main loop reads: only whole packets can end
        # there.
        self.tail = len(end) + 1
        return bytes(self._pending[:stats]) + end

    def _take(self, length: int) -> bytes:
        taken = bytes(self._pending[:length])
        del self._pending[:length]
        return taken

    def _stats_at(self) -> tuple[int, int]:
        """Returns where the numbers begin, and where the third one is. Their lengths are not
        stated; the third one is the size of all files.

        They begin after the third NDX_DONE, and the reader of the records knows the position of the
        second one. Without it, the numbers are searched for from the end: a 0 within the first
        number can then be taken for an NDX_DONE.
        """
        end = len(self._pending) - _TIMES
        if self.transfers.unreadable:
            starts = range(max(0, end - 3 * 9), end - 3 * _MIN_NUMBER_LENGTH + 1)
        else:
            known = len(self._pending) - self.transfers.beyond + 1
            starts = range(max(0, known), known + 1)
        found = []
        for at in starts:
            try:
                _, second = varint.read_varlong(self._pending, at, _MIN_NUMBER_LENGTH)
                _, third = varint.read_varlong(self._pending, second, _MIN_NUMBER_LENGTH)
                size, after = varint.read_varlong(self._pending, third, _MIN_NUMBER_LENGTH)
            except (IndexError, ValueError):
                continue
            if after == end and size == self.size and self._pending[:at].endswith(_DONES):
                found.append((at, third))
        if len(found) != 1 or self._pending[-1]:
            raise BatchInvalid("it does not end as batches do")
        return found[0]


BEFORE_DONES = 2
"""Bytes between the end of the records and a batch's tail: two NDX_DONE."""


def delayed_out_of_sync(tokens: int = TOKENS) -> bytes:
    """Returns a stream as :func:`out_of_sync` does, but rsync stays busy for a while before it
    exits with 23.

    Its list has one file, of which an empty content and then a delay are sent. An I/O error of the
    sender keeps rsync from deleting anything.
    """
    name = b".obdelta-full-pull"
    same_owner = 1 << 3 | 1 << 4
    attributes = bytes(3) + bytes(4) + varint.int_bytes(stat.S_IFREG | 0o600)
    entry = (
        bytes([same_owner, len(name)])
        + name
        + attributes
        + hashlib.md5(usedforsecurity=False).digest()
    )
    empty = (
        b"\x01"
        + struct.pack("<H", 1 << 15)
        + bytes(4 * 4)
        + b"\0"
        + hashlib.md5(usedforsecurity=False).digest()
    )
    numbers = bytes(3 * _MIN_NUMBER_LENGTH) + bytes(_TIMES)
    records = empty + delay_record(0, tokens)
    return _begin(None) + entry + _END_WITH_ERROR + _ID_LISTS + records + _DONES + numbers


_END_WITH_ERROR = b"\x04\x10\x01"
"""XMIT_EXTENDED_FLAGS, XMIT_IO_ERROR_ENDLIST, IOERR_GENERAL."""


def _begin(docker_config: Mapping[str, Any] | None) -> bytes:
    head = (
        varint.int_bytes(STREAM_FLAGS)
        + varint.int_bytes(PROTOCOL)
        + bytes([COMPATIBILITY])
        + varint.int_bytes(SEED)
    )
    return stream_header(docker_config) + head


def out_of_sync(docker_config: Mapping[str, Any] | None = None) -> bytes:
    """Returns a whole v2 stream after which every rsync exits with 23 and has changed nothing.

    Its file list is empty and reports an I/O error of the sender. docker-delta reads 23 as
    OutOfSync, and every supervisor then pulls the target in full.
    """
    return _begin(docker_config) + _END_WITH_ERROR + _ID_LISTS
