"""Hostile tars: names, links, whiteouts, headers and holes that cost much to unpack."""

from __future__ import annotations

import tarfile

from bench.hostile_images import (
    END,
    Images,
    Member,
    Pattern,
    changed,
    directory,
    extended,
    link,
    numbered,
    one,
    tar,
    text,
)


def entries_repeated_through_a_link(size: int) -> Images:
    names = numbered(size, 1100)
    first = [directory("d"), *(Member(f"d/{n}") for n in names), link("l", "d")]
    return one(first, [*first, *(Member(f"l/{n}") for n in names)])


def replaced_directories(size: int) -> Images:
    names = numbered(size, 1100)
    first = [link("l", "."), *(Member(f"{n}/x") for n in names)]
    return one(first, [*first, *(Member(f"l/{n}") for n in names)])


def opaque_marks(size: int) -> Images:
    names = numbered(size, 1600)
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
    files = [Member(f"{deep}/{n}") for n in numbered(size, 700)]
    return one(
        files, [*files, *(Member("/".join("d" * n) + "/.wh..wh..opq") for n in range(1, 80))]
    )


def whiteouts(size: int) -> Images:
    names = numbered(size, 1100)
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
        for n in numbered(size, 512 * 41)
        for member in (
            Member(f"f{n}", b"x"),
            *(Member(f"h{n}-{m}", kind=tarfile.LNKTYPE, link=f"f{n}") for m in range(40)),
        )
    ]
    return one(files, files[::-1][-1:] + files[1:])


def alternating_deep_paths(size: int) -> Images:
    ways = ["/".join("a" * 45), "/".join("b" * 45)]
    return changed([Member(f"{ways[n % 2]}/{n}", b"x") for n in numbered(size, 1024)])


def implied_directories(size: int) -> Images:
    files = [Member(f"{n}/a/b/c/x", b"x") for n in numbered(size, 1024)]
    return changed(files)


def links_with_detours(size: int) -> Images:
    links = [link("l0", "d/../" * 18 + "l1"), link("l1", "d/../" * 18 + "d"), directory("d")]
    return changed([*links, *(Member(f"l0/{n}", b"x") for n in numbered(size, 1024))])


def names_above_the_root(size: int) -> Images:
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


def short_pax_records(size: int) -> Images:
    """The shortest records that a layer may have."""
    return _pax(b"".join(b"16 key%07d=x\n" % n for n in range(60_000)), size)


def long_pax_values(size: int) -> Images:
    return _pax(b"1000010 k=" + b"v" * 999_999 + b"\n", size)


def global_pax_headers(size: int) -> Images:
    block = extended(b"g", b"6 a=b\n" * 80)
    return changed([Member(f"f{n}", b"x", before=block * 8) for n in numbered(size, 9000)])


def long_names(size: int) -> Images:
    return changed([Member(f"{n:0200}", b"x") for n in numbered(size, 2048)])


def _sparse(count: int, apart: int) -> Images:
    numbers = b"".join(b"%d\n1\n" % (n * apart) for n in range(count))
    head = b"%d\n" % count + numbers
    body = head + bytes(-len(head) % 512) + b"x" * count
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "f",
        "GNU.sparse.realsize": str(count * apart),
    }
    info = tarfile.TarInfo("GNUSparseFile.0/f")
    info.size, info.pax_headers = len(body), records
    layer = info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512) + END
    return [layer], [layer, tar([Member("other", b"x")])]


def sparse_pieces(size: int) -> Images:
    return _sparse(min(60_000, size // 12), 8)


def sparse_pieces_of_512_bytes(size: int) -> Images:
    """The closest pieces that a layer may have, with holes that no file system keeps."""
    return _sparse(min(60_000, size // 40), 512)


def holes(size: int) -> Images:
    records = (
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
        b"22 GNU.sparse.name=ff\n32 GNU.sparse.realsize=60000000\n"
    )
    body = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    layer = tar([Member("GNUSparseFile.0/ff", body, before=extended(b"x", records))])
    return [layer], [layer, tar([Member("other", b"x")])]


def empty_files(size: int) -> Images:
    files = [Member(f"d{n % 50}/{n}") for n in numbered(size)]
    return one(files, [member._replace(owner=1) for member in files])


def empty_directories(size: int) -> Images:
    return one(
        [directory(f"{n}") for n in numbered(size)], [directory(f"{n}x") for n in numbered(size)]
    )


def symbolic_links(size: int) -> Images:
    return one(
        [link(f"{n}", "x" * 90) for n in numbered(size)],
        [link(f"{n}", "y" * 90) for n in numbered(size)],
    )


def fifos(size: int) -> Images:
    return one([Member(f"{n}", kind=tarfile.FIFOTYPE) for n in numbered(size)], [Member("x")])


def types_that_change(size: int) -> Images:
    names = numbered(size, 512)
    return one([directory(f"{n}") for n in names], [Member(f"{n}", b"") for n in names])


def many_layers(size: int) -> Images:
    layers = [tar([Member(f"f{n}", text(n, max(100, size // 120)))]) for n in range(120)]
    return layers, [*layers[:60], tar([Member("new", b"x")]), *layers[60:119]]


def layers_over_each_other(size: int) -> Images:
    files = max(1, size // 100 // 600)
    layers = [tar([Member(f"f{n}", b"%d" % number) for n in range(files)]) for number in range(100)]
    return layers, [*layers[:99], tar([Member("f0", b"x")])]


TREES: tuple[Pattern, ...] = (
    entries_repeated_through_a_link,
    replaced_directories,
    opaque_marks,
    nested_opaque_marks,
    whiteouts,
    hard_links,
    alternating_deep_paths,
    implied_directories,
    links_with_detours,
    names_above_the_root,
    tiny_pax_records,
    other_pax_records,
    short_pax_records,
    long_pax_values,
    global_pax_headers,
    long_names,
    sparse_pieces,
    sparse_pieces_of_512_bytes,
    holes,
    empty_files,
    empty_directories,
    symbolic_links,
    fifos,
    types_that_change,
    many_layers,
    layers_over_each_other,
)
