"""Layers that are made to cost much: each pattern is a base and a target, as small blobs of a few
MB.

A pattern gives the layers of both images as blobs of a registry, compressed or not. ``size`` is
about how many bytes they should have; what a pattern repeats follows from it.
"""

from __future__ import annotations

import gzip
import random
import tarfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import zstandard

Blobs = list[bytes]
Images = tuple[Blobs, Blobs]
Pattern = Callable[[int], Images]
_END = bytes(1024)


class Member(NamedTuple):
    """One entry of a tar; ``before`` are raw blocks that go ahead of it, extended headers for
    example.
    """

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    owner: int = 0
    mtime: int = 1_700_000_000
    before: bytes = b""


def tar(members: Iterable[Member]) -> bytes:
    """A whole tar."""
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
    return bytes(out) + _END


def extended(kind: bytes, content: bytes) -> bytes:
    """An extended header: pax (``x``), global pax (``g``), GNU long name (``L``)."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


def one(base: Iterable[Member], target: Iterable[Member]) -> Images:
    """Both images have one layer."""
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
    """Words, as in programs and configuration."""
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
    others = [
        random.Random(-number - 1).randbytes(150_000) + text(-number - 1, 150_000)
        for number in numbers
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


def _names(size: int, each: int = 512) -> range:
    return range(max(20, size // each))


def again_through_a_link(size: int) -> Images:
    names = _names(size, 1100)
    first = [directory("d"), *(Member(f"d/{n}") for n in names), link("l", "d")]
    return one(first, [*first, *(Member(f"l/{n}") for n in names)])


def replaced_directories(size: int) -> Images:
    names = _names(size, 1100)
    first = [link("l", "."), *(Member(f"{n}/x") for n in names)]
    return one(first, [*first, *(Member(f"l/{n}") for n in names)])


def opaque_marks(size: int) -> Images:
    names = _names(size, 1600)
    files = [directory("d"), *(Member(f"d/{n}") for n in names)]
    return one(
        files,
        [
            *files,
            *(link(f"l{n}", "d") for n in names),
            *(Member(f"l{n}/.wh..wh..opq") for n in names),
        ],
    )


def nested_opaque_marks(size: int) -> Images:
    deep = "/".join("d" * 80)
    files = [Member(f"{deep}/{n}") for n in _names(size, 700)]
    return one(
        files, [*files, *(Member("/".join("d" * n) + "/.wh..wh..opq") for n in range(1, 80))]
    )


def whiteouts(size: int) -> Images:
    names = _names(size, 1100)
    files = [directory("d"), *(Member(f"d/{n}") for n in names)]
    hidden = [
        link("l", "d"),
        *(Member(f"d/.wh.{n}") for n in names),
        *(Member(f"l/{n}") for n in names),
    ]
    return [tar(files)], [tar(files), tar(hidden)]


def hard_links(size: int) -> Images:
    files = [
        member
        for n in _names(size, 512 * 41)
        for member in (
            Member(f"f{n}", b"x"),
            *(Member(f"h{n}-{m}", kind=tarfile.LNKTYPE, link=f"f{n}") for m in range(40)),
        )
    ]
    return one(files, files[::-1][-1:] + files[1:])


def alternating_deep_paths(size: int) -> Images:
    ways = ["/".join("a" * 45), "/".join("b" * 45)]
    return changed([Member(f"{ways[n % 2]}/{n}", b"x") for n in _names(size, 1024)])


def implied_directories(size: int) -> Images:
    files = [Member(f"{n}/a/b/c/x", b"x") for n in _names(size, 1024)]
    return changed(files)


def long_ways_round(size: int) -> Images:
    links = [link("l0", "d/../" * 18 + "l1"), link("l1", "d/../" * 18 + "d"), directory("d")]
    return changed([*links, *(Member(f"l0/{n}", b"x") for n in _names(size, 1024))])


def names_that_go_up(size: int) -> Images:
    count = size // 4
    pieces = [
        Member("x", before=extended(b"L", b"../" * 80_000 + b"x%d\0" % n))
        for n in range(max(1, count // 240_000))
    ]
    return one(pieces, pieces[::-1])


def _pax(records: bytes, size: int) -> Images:
    members = [
        Member(f"f{n}", b"x", before=extended(b"x", records))
        for n in range(max(1, size // len(records)))
    ]
    return changed(members)


def tiny_pax_records(size: int) -> Images:
    return _pax(b"6 a=b\n" * 170_000, size)


def other_pax_records(size: int) -> Images:
    return _pax(b"".join(b"14 key%05d=x\n" % (n % 10**5) for n in range(70_000)), size)


def long_pax_values(size: int) -> Images:
    return _pax(b"1000010 k=" + b"v" * 999_999 + b"\n", size)


def global_pax_headers(size: int) -> Images:
    block = extended(b"g", b"6 a=b\n" * 80)
    return changed([Member(f"f{n}", b"x", before=block * 8) for n in _names(size, 9000)])


def long_names(size: int) -> Images:
    return changed([Member(f"{n:0200}", b"x") for n in _names(size, 2048)])


def sparse_pieces(size: int) -> Images:
    count = min(60_000, size // 12)
    numbers = b"".join(b"%d\n1\n" % (n * 8) for n in range(count))
    head = b"%d\n" % count + numbers
    body = head + bytes(-len(head) % 512) + b"x" * count
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "f",
        "GNU.sparse.realsize": str(count * 8),
    }
    info = tarfile.TarInfo("GNUSparseFile.0/f")
    info.size, info.pax_headers = len(body), records
    layer = info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512) + _END
    return [layer], [layer, tar([Member("other", b"x")])]


def holes(size: int) -> Images:
    records = (
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
        b"22 GNU.sparse.name=ff\n32 GNU.sparse.realsize=60000000\n"
    )
    body = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    layer = tar([Member("GNUSparseFile.0/ff", body, before=extended(b"x", records))])
    return [layer], [layer, tar([Member("other", b"x")])]


def empty_files(size: int) -> Images:
    files = [Member(f"d{n % 50}/{n}") for n in _names(size)]
    return one(files, [member._replace(owner=1) for member in files])


def empty_directories(size: int) -> Images:
    return one(
        [directory(f"{n}") for n in _names(size)], [directory(f"{n}x") for n in _names(size)]
    )


def symbolic_links(size: int) -> Images:
    return one(
        [link(f"{n}", "x" * 90) for n in _names(size)],
        [link(f"{n}", "y" * 90) for n in _names(size)],
    )


def fifos(size: int) -> Images:
    return one([Member(f"{n}", kind=tarfile.FIFOTYPE) for n in _names(size)], [Member("x")])


def types_that_change(size: int) -> Images:
    names = _names(size, 512)
    return one([directory(f"{n}") for n in names], [Member(f"{n}", b"") for n in names])


def many_layers(size: int) -> Images:
    layers = [tar([Member(f"f{n}", text(n, max(100, size // 120)))]) for n in range(120)]
    return layers, [*layers[:60], tar([Member("new", b"x")]), *layers[60:119]]


def layers_over_each_other(size: int) -> Images:
    files = max(1, size // 100 // 600)
    layers = [tar([Member(f"f{n}", b"%d" % number) for n in range(files)]) for number in range(100)]
    return layers, [*layers[:99], tar([Member("f0", b"x")])]


def _compressed(compress: Callable[[bytes], bytes], size: int) -> Images:
    base, target = ordinary(size // 2)
    return [compress(base[0])], [compress(target[0])]


def tiny_gzip_members(size: int) -> Images:
    empty = gzip.compress(b"", mtime=0)
    return _compressed(lambda layer: gzip.compress(layer, 1) + empty * (size // 40), size)


def small_gzip_members(size: int) -> Images:
    def compress(layer: bytes) -> bytes:
        return b"".join(gzip.compress(layer[at : at + 100], 1) for at in range(0, len(layer), 100))

    return _compressed(compress, size)


def tiny_zstd_frames(size: int) -> Images:
    compressor = zstandard.ZstdCompressor()
    return _compressed(
        lambda layer: compressor.compress(layer) + compressor.compress(b"") * (size // 20), size
    )


def gzip_bomb(size: int) -> Images:
    layer = tar([Member("zeros", bytes(8 * size))])
    return [gzip.compress(layer)], [gzip.compress(layer[:-1024] + tar([Member("x")]))]


def zstd_bomb(size: int) -> Images:
    compress = zstandard.ZstdCompressor().compress
    layer = tar([Member("zeros", bytes(8 * size))])
    return [compress(layer)], [compress(layer[:-1024] + tar([Member("x")]))]


def stored_gzip(size: int) -> Images:
    return _compressed(lambda layer: gzip.compress(layer, 0), size)


def names_of_digits(size: int) -> Images:
    names = _names(size, 1024)
    base = [Member(f"frame{n:07}.jpg", random.Random(n).randbytes(64)) for n in names]
    target = [
        Member(f"frame{n + len(names):07}.jpg", random.Random(n + 10**7).randbytes(64))
        for n in names
    ]
    return one(base, target)


def names_of_one_stem(size: int) -> Images:
    names = _names(size, 1024)
    base = [Member(f"{n}/index.js", random.Random(n).randbytes(200)) for n in names]
    return one(
        base, [Member(f"{n}x/index.js", random.Random(-n - 1).randbytes(200)) for n in names]
    )


def equal_files(size: int) -> Images:
    content = text(5, 1500)
    names = _names(size, 2048)
    return one([Member(f"a{n}", content) for n in names], [Member(f"b{n}", content) for n in names])


def nearly_equal_files(size: int) -> Images:
    content, names = text(5, 3500), _names(size, 4096)
    return one(
        [Member(f"a{n}", content + b"%d" % n) for n in names],
        [Member(f"b{n}", b"%d" % n + content) for n in names],
    )


def _one_file(base: bytes, target: bytes) -> Images:
    return one([Member("f", base)], [Member("f", target)])


def zeros(size: int) -> Images:
    return _one_file(bytes(size), bytes(size - 1) + b"x")


def short_period(size: int) -> Images:
    return _one_file(b"abc" * (size // 3), b"abcd" * (size // 4))


def long_period(size: int) -> Images:
    piece = random.Random(2).randbytes(1021)
    return _one_file(piece * (size // 1021), piece[1:] * (size // 1020))


def noise(size: int) -> Images:
    return _one_file(random.Random(3).randbytes(size), random.Random(4).randbytes(size))


def shuffled_pieces(size: int) -> Images:
    chance = random.Random(6)
    pieces = [chance.randbytes(64) for _ in range(size // 64)]
    other = pieces[:]
    chance.shuffle(other)
    return _one_file(b"".join(pieces), b"".join(other))


def a_byte_in_each_block(size: int) -> Images:
    content = bytearray(random.Random(7).randbytes(size))
    new = content[:]
    for at in range(0, size, 512):
        new[at] ^= 1
    return _one_file(bytes(content), bytes(new))


def a_byte_in_each_line(size: int) -> Images:
    content = bytearray(random.Random(8).randbytes(size))
    new = content[:]
    for at in range(0, size, 40):
        new[at] ^= 1
    return _one_file(bytes(content), bytes(new))


def insertions(size: int) -> Images:
    content = random.Random(9).randbytes(size)
    return _one_file(
        content, b"".join(content[at : at + 1000] + b"+" for at in range(0, size, 1000))
    )


def equal_weak_checksums(size: int) -> Images:
    """Blocks of rsync whose rolling checksums are equal and whose contents are not: it looks at all
    of them for each.
    """
    chance = random.Random(10)

    def block() -> bytes:
        # Moving one byte up and one down by the same distance keeps both sums.
        content = bytearray(b"m" * 512)
        for _ in range(20):
            left, right, step = (
                chance.randrange(200),
                chance.randrange(300, 500),
                chance.randrange(1, 10),
            )
            for at, change in ((left, 1), (left + step, -1), (right, -1), (right + step, 1)):
                if 32 < content[at] + change < 126:
                    content[at] += change
                else:
                    return bytes(b"m" * 512)
        return bytes(content)

    return _one_file(
        b"".join(block() for _ in range(size // 512)), b"".join(block() for _ in range(size // 512))
    )


def reversed_order(size: int) -> Images:
    members = [Member(f"{n}", text(n, 3000)) for n in range(size // 3600)]
    return one(members, members[::-1])


HOSTILE: tuple[Pattern, ...] = (
    again_through_a_link,
    replaced_directories,
    opaque_marks,
    nested_opaque_marks,
    whiteouts,
    hard_links,
    alternating_deep_paths,
    implied_directories,
    long_ways_round,
    names_that_go_up,
    tiny_pax_records,
    other_pax_records,
    long_pax_values,
    global_pax_headers,
    long_names,
    sparse_pieces,
    holes,
    empty_files,
    empty_directories,
    symbolic_links,
    fifos,
    types_that_change,
    many_layers,
    layers_over_each_other,
    tiny_gzip_members,
    small_gzip_members,
    tiny_zstd_frames,
    gzip_bomb,
    zstd_bomb,
    stored_gzip,
    names_of_digits,
    names_of_one_stem,
    equal_files,
    nearly_equal_files,
    zeros,
    short_period,
    long_period,
    noise,
    shuffled_pieces,
    a_byte_in_each_block,
    a_byte_in_each_line,
    insertions,
    equal_weak_checksums,
    reversed_order,
)
"""The patterns, in the order of the report."""
