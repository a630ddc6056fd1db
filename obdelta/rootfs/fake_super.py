"""rsync's ``--fake-super`` attribute: mode, owner and device of an entry in an extended attribute.

It lets any user hold any tree. An entry that is not a directory is a regular file: a device or FIFO
is an empty file, a symbolic link a file with its target's text. The attribute has the mode with the
file's type, the device's numbers and the owner. Source: rsync(1) at ``--fake-super``; the format
``"%o %u,%u %u:%u"`` was read from the attribute that rsync writes.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

from obdelta.errors import SettingsError

NAME = "user.rsync.%stat"
_VALUE = re.compile(rb"([0-7]{1,7}) ([0-9]{1,10}),([0-9]{1,10}) (-?[0-9]{1,10}):(-?[0-9]{1,10})")
_UNSIGNED = 0xFFFFFFFF


class StatAttribute(NamedTuple):
    """The attribute's values. ``mode`` has the type's bits (``stat.S_IFREG`` …); ``major`` and
    ``minor`` are 0 except for devices.
    """

    mode: int
    uid: int
    gid: int
    major: int = 0
    minor: int = 0

    def encode(self) -> bytes:
        """Returns the attribute in rsync's format."""
        return b"%o %d,%d %d:%d" % (self.mode, self.major, self.minor, self.uid, self.gid)

    @property
    def real_mode(self) -> int:
        """Returns the permissions that rsync gives to the file that holds the entry: those of the
        entry, and always read and write for the owner.
        """
        return (self.mode & 0o777) | (0o700 if stat.S_ISDIR(self.mode) else 0o600)

    def write(self, descriptor: int) -> None:
        """Sets attribute and permissions, so that rsync finds nothing to change."""
        os.setxattr(descriptor, NAME, self.encode())
        os.fchmod(descriptor, self.real_mode)

    @classmethod
    def decode(cls, value: bytes) -> StatAttribute:
        """Parses the attribute. Raises ValueError."""
        match = _VALUE.fullmatch(value)
        if match is None:
            raise ValueError("not an attribute of rsync's --fake-super")
        major, minor, uid, gid = (int(match[number]) for number in (2, 3, 4, 5))
        return cls(int(match[1], 8), uid & _UNSIGNED, gid & _UNSIGNED, major, minor)

    @classmethod
    def of(cls, status: os.stat_result) -> StatAttribute:
        """Returns the values of a real file."""
        device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        major, minor = (os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0)
        return cls(status.st_mode, status.st_uid, status.st_gid, major, minor)


def require_attributes(directory: Path) -> None:
    """Raises SettingsError for ``state-dir`` if the directory's file system does not accept such
    attributes from this user.
    """
    probe = directory / f".{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    value = StatAttribute(stat.S_IFLNK | 0o777, 0, 0).encode()
    try:
        os.setxattr(descriptor, NAME, value)
        if os.getxattr(descriptor, NAME) == value:
            return
    except OSError:
        pass
    finally:
        os.close(descriptor)
        probe.unlink()
    expected = "a file system with user.* extended attributes (v2 deltas keep owners in them)"
    raise SettingsError("state-dir", str(directory), expected)
