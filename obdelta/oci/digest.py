"""Digests of blobs, diff_ids of uncompressed layers and chain IDs of layer stacks, as three types.

They are never bare strings, so that one cannot pass for another.

Source: OCI image specification, ``descriptor.md`` (digests) and ``config.md`` (diff_id, chain ID).
Only sha256 is supported: it is the only algorithm that the device's engine, the registry and
openBalena use.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from obdelta.errors import BadDigest

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class _Sha256:
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses ``sha256:<64 hex>``. Raises BadDigest on anything else."""
        match = _SHA256.fullmatch(text)
        if match is None:
            raise BadDigest(text)
        return cls(match[1])

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Returns the hash of bytes in memory (small ones: configs, manifests)."""
        return cls(hashlib.sha256(content).hexdigest())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"


class Digest(_Sha256):
    """The hash of a blob or manifest as it travels (compressed layers, config JSON). An image ID is
    the digest of its config.
    """

    __slots__ = ()


class DiffID(_Sha256):
    """The hash of a layer's uncompressed tar."""

    __slots__ = ()


class ChainID(_Sha256):
    """The hash of a stack of layers, bottom to top."""

    __slots__ = ()


def chain_ids(diff_ids: Iterable[DiffID]) -> list[ChainID]:
    """Returns the chain ID after each layer, bottom to top."""
    chain: list[ChainID] = []
    for diff_id in diff_ids:
        chain.append(
            ChainID(diff_id.hex)
            if not chain
            else ChainID.of(f"{chain[-1]} {diff_id}".encode("ascii"))
        )
    return chain


def common_prefix(base: Iterable[_Sha256], target: Iterable[_Sha256]) -> int:
    """Returns how many leading layers both images share, by their diff_ids or by their blobs.
    Layers with equal diff_ids from the bottom have equal chain IDs.
    """
    count = 0
    for base_digest, target_digest in zip(base, target, strict=False):
        if base_digest != target_digest:
            break
        count += 1
    return count
