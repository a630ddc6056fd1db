"""Layers that are expensive on purpose: each pattern is a base and a target, as small blobs of a
few MB.

A pattern gives the layers of both images as blobs of a registry, compressed or not. ``size`` is
their approximate number of bytes, from which the number of repetitions follows.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

Blobs = list[bytes]
Images = tuple[Blobs, Blobs]
Pattern = Callable[[int], Images]
END = bytes(1024)


class Member(NamedTuple):
    """One entry of a tar; ``before`` are raw blocks before it, for example extended headers."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    owner: int = 0
    mtime: int = 1_700_000_000
    before: bytes = b""


def tar(members: Iterable[Member]) -> bytes:
    """Returns a complete tar."""
    out = bytearray()
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.type, info.linkname, info.size, info.mtime = (
            member.kind,
            member.link,
            len(member.content),
            member.mtime,
        )
        info.uid, info.mode = member.owner, 0o755
        head = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
        out += member.before + head + member.content + bytes(-len(member.content) % 512)
    return bytes(out) + END


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended header: pax (``x``), global pax (``g``), GNU long name (``L``)."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


def one(base: Iterable[Member], target: Iterable[Member]) -> Images:
    """Returns images of one layer each."""
    return [tar(base)], [tar(target)]


def changed(members: list[Member], every: int = 3) -> Images:
    """The target has other contents in every so many files."""
    new = [
        member._replace(content=member.content[::-1] + b"!")
        if not number % every and member.kind == tarfile.REGTYPE
        else member
        for number, member in enumerate(members)
    ]
    return one(members, new)


def directory(name: str) -> Member:
    """A directory."""
    return Member(name, kind=tarfile.DIRTYPE)


def link(name: str, to: str) -> Member:
    """A symbolic link."""
    return Member(name, kind=tarfile.SYMTYPE, link=to)


def text(seed: int, size: int) -> bytes:
    """Returns words, as in programs and configuration."""
    chance = random.Random(seed)
    words = [
        bytes(chance.choices(b"abcdefghijklmnopqrstuvwxyz_", k=chance.randint(2, 11)))
        for _ in range(400)
    ]
    out = bytearray()
    while len(out) < size:
        out += b" ".join(chance.choices(words, k=12)) + b"\n"
    return bytes(out[:size])


def ordinary(size: int) -> Images:
    """A program of many modules: files of 1 to 60 KB, and one release later a tenth of them has
    changed.
    """
    chance = random.Random(1)
    base, target, total, number = [directory("app")], [directory("app")], 0, 0
    while total < size:
        if not number % 20:
            base.append(directory(f"app/part{number // 20}"))
            target.append(base[-1])
        content = text(number, chance.choice([1_000, 4_000, 9_000, 60_000]))
        member = Member(f"app/part{number // 20}/module{chance.randrange(10**6)}.js", content)
        base.append(member)
        at = chance.randrange(len(content))
        new = content[:at] + text(number + 10**6, 200) + content[at + 100 :]
        target.append(member._replace(content=new) if not number % 10 else member)
        total += len(content)
        number += 1
    return one(base, target)


def large_files(size: int) -> Images:
    """Programs and libraries, ordinary too: files of 300 KB, all of them new."""
    numbers = range(max(2, size // 300_000))
    contents = [
        random.Random(number).randbytes(150_000) + text(number, 150_000) for number in numbers
    ]
    # No negative seeds: Random(-1) is Random(1).
    others = [
        random.Random(number).randbytes(150_000) + text(number, 150_000)
        for number in range(10**6, 10**6 + len(numbers))
    ]
    return one(
        [
            Member(f"lib{number}.so", content)
            for number, content in zip(numbers, contents, strict=True)
        ],
        [
            Member(f"lib{number}.so.2", content)
            for number, content in zip(numbers, others, strict=True)
        ],
    )


def small_files(size: int) -> Images:
    """A folder of tiny modules and of links to them, ordinary too: files of 0 to 1,500 bytes, all
    of which change.
    """
    chance = random.Random(11)
    base: list[Member] = []
    for number in range(size // 1500):
        if not number % 12:
            base.append(directory(f"p{number // 12}"))
        content = text(number, chance.choice([0, 80, 400, 1500]))
        base.append(Member(f"p{number // 12}/m{chance.randrange(10**6)}.py", content))
        if not number % 8:
            base.append(link(f"p{number // 12}/l{number}", "m"))
    return changed(base, 1)


def numbered(size: int, each: int = 512) -> range:
    return range(max(20, size // each))
