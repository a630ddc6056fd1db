"""Hostile compression: streams of many pieces, of useless tables, and of almost no bytes."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable

import zstandard

from bench.hostile_images import Images, Member, Pattern, ordinary, tar


def _compressed(compress: Callable[[bytes], bytes], size: int) -> Images:
    base, target = ordinary(size // 2)
    return [compress(base[0])], [compress(target[0])]


def tiny_gzip_members(size: int) -> Images:
    empty = gzip.compress(b"", mtime=0)
    return _compressed(lambda layer: gzip.compress(layer, 1) + empty * (size // 40), size)


def _in_pieces(compress: Callable[[bytes], bytes], each: int, size: int) -> Images:
    return _compressed(
        lambda layer: b"".join(
            compress(layer[at : at + each]) for at in range(0, len(layer), each)
        ),
        size,
    )


def small_gzip_members(size: int) -> Images:
    return _in_pieces(lambda piece: gzip.compress(piece, 1), 100, size)


def tiny_zstd_frames(size: int) -> Images:
    compressor = zstandard.ZstdCompressor()
    return _compressed(
        lambda layer: compressor.compress(layer) + compressor.compress(b"") * (size // 20), size
    )


def gzip_members_of_256_bytes(size: int) -> Images:
    """The smallest members that inflating accepts."""
    return _in_pieces(lambda piece: gzip.compress(piece, 1), 256, size)


def zstd_frames_of_256_bytes(size: int) -> Images:
    return _in_pieces(zstandard.ZstdCompressor().compress, 256, size)


def bzip2_stream(size: int) -> Images:
    """Compresses ordinary content once: the cost of bzip2 without hostile pieces."""
    return _compressed(bz2.compress, size)


def tiny_bzip2_streams(size: int) -> Images:
    return _in_pieces(bz2.compress, 256, size)


def bzip2_streams_of_16_kb(size: int) -> Images:
    return _in_pieces(bz2.compress, 16 * 1024, size)


def huffman_tables(size: int) -> Images:
    """A gzip member of deflate blocks that hold a table of codes each, and no content (RFC 1951,
    3.2.7). Any inflater builds all the tables.
    """
    lengths = "".join("100" if symbol in (2, 17) else "000" for symbol in range(18))
    # Codes for byte 0, the block's end and one distance; 255 codes between are unused.
    block = "01" + "00000" + "00000" + "0111" + lengths + "0" + "11111111" + "10101011" + "00" + "1"

    def packed(bits: str) -> bytes:
        return int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")

    blocks = packed(("0" + block) * 8) * (size // 8 // len(block)) + packed("1" + block)
    member = gzip.compress(b"", mtime=0)[:10] + blocks + bytes(8)
    return _compressed(lambda layer: member + gzip.compress(layer, 1), size)


def gzip_bomb(size: int) -> Images:
    layer = tar([Member("zeros", bytes(8 * size))])
    return [gzip.compress(layer)], [gzip.compress(layer[:-1024] + tar([Member("x")]))]


def zstd_bomb(size: int) -> Images:
    compress = zstandard.ZstdCompressor().compress
    layer = tar([Member("zeros", bytes(8 * size))])
    return [compress(layer)], [compress(layer[:-1024] + tar([Member("x")]))]


def stored_gzip(size: int) -> Images:
    return _compressed(lambda layer: gzip.compress(layer, 0), size)


COMPRESSION: tuple[Pattern, ...] = (
    tiny_gzip_members,
    small_gzip_members,
    tiny_zstd_frames,
    gzip_members_of_256_bytes,
    zstd_frames_of_256_bytes,
    bzip2_stream,
    tiny_bzip2_streams,
    bzip2_streams_of_16_kb,
    huffman_tables,
    gzip_bomb,
    zstd_bomb,
    stored_gzip,
)
