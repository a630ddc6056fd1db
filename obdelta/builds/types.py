"""Types of builds: the pair of images, and the interface of a builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.errors import ObdeltaError
from obdelta.oci import Digest, common_prefix
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, Kind
from obdelta.store.catalogue.slow_work import work_key
from obdelta.store.file_writer import ExternalFile


@dataclass(frozen=True, slots=True)
class Pair:
    """Base and target of a delta. ``key`` names the contents for ever, even when tags move."""

    kind: Kind
    recipe: int
    base: ResolvedImage
    target: ResolvedImage

    @property
    def key(self) -> DeltaKey:
        return DeltaKey(
            self.kind, self.recipe, self.base.manifest.digest, self.target.manifest.digest
        )

    @property
    def repositories(self) -> tuple[str, str]:
        """The repositories of base and target."""
        return self.base.repository, self.target.repository

    @property
    def full_bytes(self) -> int:
        """The bytes of a full pull by a device that has the base, according to the manifests.

        They are the config and the layers after those that both images begin with.
        """
        base, target = self.base.manifest.layers, self.target.manifest.layers
        common = common_prefix((layer.digest for layer in base), (layer.digest for layer in target))
        return self.target.manifest.config.size + sum(layer.size for layer in target[common:])

    @property
    def work(self) -> Digest:
        """Names the work by its layers: the same for other manifests and configs over them."""
        layers = [
            [layer.digest for layer in image.manifest.layers] for image in (self.base, self.target)
        ]
        return work_key(f"{self.kind} {self.recipe}", *layers)

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.base.repository}@{self.base.manifest.digest.hex[:12]} -> "
            f"{self.target.repository}@{self.target.manifest.digest.hex[:12]}"
        )


class DeltaTooLarge(ObdeltaError):
    """The delta is not enough smaller than the full download (setting ``worth``)."""

    def __init__(self, delta_bytes: int, full_bytes: int) -> None:
        self.delta_bytes, self.full_bytes = delta_bytes, full_bytes
        super().__init__(
            f"not worth it: the delta has {delta_bytes} bytes, the full download {full_bytes}"
        )


Report = Callable[[Mapping[str, object]], None]
Grows = Callable[[ExternalFile], None]
"""A builder reports a file that can be read while it is written, and again whenever more is known
of it.
"""
Takes = Callable[[ExternalFile], bool]
"""Returns whether a client accepts the growing file as it is now."""


class Builder(Protocol):
    """Builds one kind of delta."""

    kind: Kind
    recipe: int

    async def build(
        self,
        pair: Pair,
        credentials: Credentials,
        report: Report,
        grows: Grows,
        *,
        low_memory: bool = False,
    ) -> DeltaRow:
        """Builds, proves and publishes; leftovers of a failure are removed.

        ``low_memory``: with as little memory as possible, at any other cost. A failed proof also
        removes the cached layers or trees that it used: another attempt begins with fresh ones.
        """
