"""Applies one layer tar to a tree, as an engine would. :mod:`obdelta.rootfs.unpack` lists the
rules.
"""

from __future__ import annotations

import os
import stat

from obdelta.errors import LayerInvalid
from obdelta.oci import DiffID
from obdelta.rootfs import fake_super, tar
from obdelta.rootfs.bounds import Bounds
from obdelta.rootfs.fake_super import StatAttribute
from obdelta.rootfs.layer_paths import LayerPaths
from obdelta.rootfs.tree import Names, RemovedKind, Tree, listed

MAX_TARGET = 4095
"""Bytes of a symbolic link's target; the kernel's limit."""

_WHITEOUT, _META, _OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"
_NEWEST = (1 << 63) - 1
_SMALL = 1 << 18
_TYPES = {
    tar.REGULAR: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHARACTER: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.DIRECTORY: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
}
_DEVICES = (tar.CHARACTER, tar.BLOCK_DEVICE)
IMPLIED = StatAttribute(stat.S_IFDIR | 0o755, 0, 0)
"""The attributes of a directory that no entry describes."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _clamped(mtime: int) -> int:
    return mtime if 0 <= mtime <= _NEWEST else 0


class Layer:
    """One layer being applied to the tree. Sets hold joined paths: there may be very many."""

    def __init__(
        self, diff_id: DiffID, descriptor: int, tree: Tree, mtimes: dict[bytes, int], bounds: Bounds
    ) -> None:
        self._what, self._descriptor, self._bounds = diff_id, descriptor, bounds
        self._tree, self._mtimes = tree, mtimes
        self._spelled: set[bytes] = set()  # names as engines spell them
        # paths of this layer's entries, with directories and whiteouts
        self._made: set[bytes] = set()
        self._directories: set[bytes] = set()  # those of them that are directories
        self._implied: set[bytes] = set()  # those of them that have no entry of their own (so far)
        self._below: dict[bytes, list[bytes]] = {}  # directories to the names below them
        # directories of lower layers that this one has a whiteout for
        self._hidden: set[bytes] = set()
        self._emptied: set[bytes] = set()  # directories without anything left of lower layers
        self._paths = LayerPaths(diff_id, tree, bounds)
        self._newest = 0

    def apply(self) -> None:
        """Applies all members, then sets the mtimes of directories that have no entry."""
        self._reset_directory(())
        for member in tar.members(self._descriptor, self._what):
            self._bounds.entry(self._what)
            self._newest = max(self._newest, _clamped(member.mtime))
            self._member(member)
            self._bounds.steps(self._tree.steps, self._what)
        for key in self._implied:
            self._mtimes[key] = self._newest if key else max(self._newest, self._mtimes.get(b"", 0))

    def _member(self, member: tar.Member) -> None:
        names, spelled = self._paths.clean(member.name)
        if not names:
            if spelled:  # "/" or "..": an engine takes it for the root directory; it ignores "./"
                self._root(member)
            return
        if any(name.startswith(_META) for name in names[:-1]):
            return
        if spelled in self._spelled:
            raise self._broken(member.name, "occurs twice, which engines refuse")
        self._spelled.add(spelled)
        path = (*self._paths.resolve(names[:-1]), names[-1])
        self._make_directories(path[:-1])
        name = path[-1]
        if not name.startswith(_WHITEOUT):
            self._entry(member, path)
        elif name == _OPAQUE:
            if path[:-1]:  # overlayfs ignores the mark on a layer's root
                self._hide(path[:-1])
        elif not name.startswith(_META):
            self._whiteout(member.name, path[:-1], name[len(_WHITEOUT) :])

    def _root(self, member: tar.Member) -> None:
        if member.type != tar.DIRECTORY:
            raise self._broken(member.name, "replaces the root directory")
        self._set_directory(member, ())

    # -- directories --

    def _make_directories(self, path: Names) -> None:
        """Makes or resets parent directories that this layer has no entry for: a directory of a
        lower layer is reset.
        """
        if b"/".join(path) in self._directories:
            return
        for depth in range(1, len(path) + 1):
            if b"/".join(path[:depth]) not in self._directories:
                self._reset_directory(path[:depth])

    def _reset_directory(self, path: Names) -> None:
        key = b"/".join(path)
        if key in self._made:
            raise self._broken(key, "is used as a directory but is not one")
        attribute = IMPLIED
        if path:
            self._bounds.implied_directory(self._what)
            above = StatAttribute.decode(os.getxattr(self._tree.open(path[:-1]), fake_super.NAME))
            # The kernel hands this bit down when an engine makes a directory (the engine sets the
            # group).
            attribute = IMPLIED._replace(mode=IMPLIED.mode | above.mode & stat.S_ISGID)
            self._directory(path)
        attribute.write(self._tree.open(path))
        self._add(key)
        self._directories.add(key)
        self._implied.add(key)

    def _directory(self, path: Names) -> None:
        """Makes sure that there is a directory, in place of anything else."""
        parent = self._tree.open(path[:-1])
        try:
            os.mkdir(path[-1], 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(path[-1], dir_fd=parent, follow_symlinks=False).st_mode):
                self._tree.remove(path)
                os.mkdir(path[-1], 0o700, dir_fd=self._tree.open(path[:-1]))

    def _set_directory(self, member: tar.Member, path: Names) -> None:
        self._attribute(member).write(self._tree.open(path))
        key = b"/".join(path)
        self._mtimes[key] = _clamped(member.mtime)
        self._add(key)
        self._directories.add(key)
        self._implied.discard(key)

    def _hide(self, directory: Names) -> None:
        """Removes the contents that lower layers have in a directory, once per directory."""
        key = b"/".join(directory)
        if key in self._emptied:
            return
        self._emptied.add(key)
        for name, is_directory in listed(self._tree.open(directory)):
            self._tree.steps += 1
            path = (*directory, name)
            if b"/".join(path) not in self._made:
                self._tree.remove(path)
            elif is_directory:
                self._hide(path)

    def _whiteout(self, spelled: bytes, directory: Names, name: bytes) -> None:
        path = (*directory, name)
        key = b"/".join(path)
        if name in (b"", b".", b"..") or key in self._made:
            raise self._broken(spelled, "hides an entry of its own layer, which engines refuse")
        if self._tree.remove(path) is RemovedKind.DIRECTORY:
            self._hidden.add(key)
        self._add(key)

    # -- other entries --

    def _entry(self, member: tar.Member, path: Names) -> None:
        key = b"/".join(path)
        if key in self._made:
            self._replace_own(member, key)
        if member.type == tar.DIRECTORY:
            self._directory(path)
            self._set_directory(member, path)
            return
        self._tree.remove(path)
        self._add(key)
        if member.type == tar.LINK:
            self._hard_link(member, path)
            return
        attribute = self._attribute(member)
        if member.type == tar.CHARACTER and not attribute.major and not attribute.minor:
            return  # overlayfs treats this as a whiteout
        if member.type == tar.SYMLINK:
            if not 0 < len(member.linkname) <= MAX_TARGET:
                raise self._broken(
                    member.name, "is a symbolic link with no target, or too long a one"
                )
            self._paths.symlinks[key] = member.linkname
        descriptor = os.open(path[-1], _NEW_FILE, 0o600, dir_fd=self._tree.open(path[:-1]))
        try:
            if member.type == tar.SYMLINK:
                os.write(descriptor, member.linkname)
            elif member.type == tar.REGULAR:
                self._copy(member, descriptor)
            attribute.write(descriptor)
            # Engines do not clamp mtimes of symbolic links. (Times that no kernel accepts do not
            # matter.)
            mtime = (
                max(-_NEWEST, min(member.mtime, _NEWEST))
                if member.type == tar.SYMLINK
                else _clamped(member.mtime)
            )
            os.utime(descriptor, ns=(mtime, mtime))
        finally:
            os.close(descriptor)

    def _replace_own(self, member: tar.Member, key: bytes) -> None:
        """Replaces a path that this layer has already: by another name through a symbolic link, or
        by a whiteout.
        """
        if member.type == tar.DIRECTORY:
            if key in self._directories:
                return
            if key in self._hidden:  # overlayfs would merge what the whiteout should have hidden
                raise self._broken(member.name, "is a directory and has a whiteout")
        elif key in self._directories and key not in self._implied:
            # An engine would end up giving it the directory's mtime.
            raise self._broken(member.name, "replaces a directory of its own layer")
        self._forget(key)

    def _add(self, key: bytes) -> None:
        """Records that an entry ended up at a path."""
        if key and key not in self._made:
            self._below.setdefault(key.rpartition(b"/")[0], []).append(key)
        self._made.add(key)

    def _forget(self, key: bytes) -> None:
        """Drops this layer's records of a path and of everything below it."""
        waiting = [key]
        while waiting:
            key = waiting.pop()
            self._tree.steps += 1
            waiting += self._below.pop(key, ())
            self._made.discard(key)
            self._directories.discard(key)
            self._implied.discard(key)
            self._paths.symlinks.pop(key, None)

    def _hard_link(self, member: tar.Member, path: Names) -> None:
        target, _ = self._paths.clean(member.linkname)
        if not target:
            raise self._broken(member.name, "is a hard link to a directory")
        target = (*self._paths.resolve(target[:-1]), target[-1])
        try:
            source = os.dup(self._tree.open(target[:-1]))
            try:
                directory = self._tree.open(path[:-1])
                os.link(
                    target[-1],
                    path[-1],
                    src_dir_fd=source,
                    dst_dir_fd=directory,
                    follow_symlinks=False,
                )
            finally:
                os.close(source)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise self._broken(
                member.name, "is a hard link to a missing file or to a directory"
            ) from error
        descriptor = os.open(
            path[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._tree.open(path[:-1])
        )
        try:
            old = StatAttribute.decode(os.getxattr(descriptor, fake_super.NAME))
            new = self._attribute(member)
            if stat.S_ISLNK(old.mode):
                self._paths.symlinks[b"/".join(path)] = os.pread(descriptor, MAX_TARGET, 0)
            else:
                old = old._replace(mode=stat.S_IFMT(old.mode) | stat.S_IMODE(member.mode))
                mtime = _clamped(member.mtime)
                os.utime(descriptor, ns=(mtime, mtime))
            old._replace(uid=new.uid, gid=new.gid).write(descriptor)
        finally:
            os.close(descriptor)

    def _copy(self, member: tar.Member, descriptor: int) -> None:
        self._bounds.content(member.size, self._what)
        if (
            member.size <= _SMALL
            and len(member.extents) == 1
            and member.extents[0].length == member.size
        ):
            rest = memoryview(os.pread(self._descriptor, member.size, member.extents[0].source))
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        else:
            os.ftruncate(descriptor, member.size)
            for extent in member.extents:
                os.lseek(descriptor, extent.position, os.SEEK_SET)
                done = 0
                while done < extent.length:
                    sent = os.sendfile(
                        descriptor, self._descriptor, extent.source + done, extent.length - done
                    )
                    if sent == 0:
                        raise LayerInvalid(self._what, "it is truncated")
                    done += sent
        if os.fstat(descriptor).st_size != member.size:
            raise LayerInvalid(self._what, "it is truncated")

    def _attribute(self, member: tar.Member) -> StatAttribute:
        if not (0 <= member.uid < 0xFFFFFFFF and 0 <= member.gid < 0xFFFFFFFF):
            raise self._broken(member.name, "has an owner that is out of range")
        kind = _TYPES.get(member.type, stat.S_IFREG)
        mode = kind | (0o777 if kind == stat.S_IFLNK else stat.S_IMODE(member.mode))
        if member.type not in _DEVICES:
            return StatAttribute(mode, member.uid, member.gid)
        if not (0 <= member.major < 1 << 12 and 0 <= member.minor < 1 << 20):
            raise self._broken(member.name, "has a device number that is out of range")
        return StatAttribute(mode, member.uid, member.gid, member.major, member.minor)

    def _broken(self, name: bytes, why: str) -> LayerInvalid:
        shown = name if len(name) <= 80 else name[:77] + b"..."
        return LayerInvalid(self._what, f"{os.fsdecode(shown)!a} {why}")
