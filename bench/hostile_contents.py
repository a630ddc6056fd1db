"""Hostile contents: bytes and names that cost much to match between base and target."""

from __future__ import annotations

import random

from bench.hostile_images import Images, Member, Pattern, numbered, one, text


def names_of_digits(size: int) -> Images:
    names = numbered(size, 1024)
    base = [Member(f"frame{n:07}.jpg", random.Random(n).randbytes(64)) for n in names]
    target = [
        Member(f"frame{n + len(names):07}.jpg", random.Random(n + 10**7).randbytes(64))
        for n in names
    ]
    return one(base, target)


def names_of_one_stem(size: int) -> Images:
    names = numbered(size, 1024)
    base = [Member(f"{n}/index.js", random.Random(n).randbytes(200)) for n in names]
    return one(
        base, [Member(f"{n}x/index.js", random.Random(-n - 1).randbytes(200)) for n in names]
    )


def equal_files(size: int) -> Images:
    content = text(5, 1500)
    names = numbered(size, 2048)
    return one([Member(f"a{n}", content) for n in names], [Member(f"b{n}", content) for n in names])


def nearly_equal_files(size: int) -> Images:
    content, names = text(5, 3500), numbered(size, 4096)
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


def _changed_bytes(seed: int, size: int, apart: int) -> Images:
    content = random.Random(seed).randbytes(size)
    new = bytearray(content)
    for at in range(0, size, apart):
        new[at] ^= 1
    return _one_file(content, bytes(new))


def a_byte_in_each_block(size: int) -> Images:
    return _changed_bytes(7, size, 512)


def a_byte_in_each_line(size: int) -> Images:
    return _changed_bytes(8, size, 40)


def insertions(size: int) -> Images:
    content = random.Random(9).randbytes(size)
    return _one_file(
        content, b"".join(content[at : at + 1000] + b"+" for at in range(0, size, 1000))
    )


def equal_weak_checksums(size: int) -> Images:
    """Makes blocks with equal rolling checksums and different contents: for each of them rsync
    examines all others.
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


CONTENTS: tuple[Pattern, ...] = (
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
