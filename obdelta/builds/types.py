"""What a build is about, and what a builder promises."""

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
    """What a delta leads from and to. ``key`` names the contents for ever, whatever tags do."""

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
        """Of base and target."""
        return self.base.repository, self.target.repository

    @property
    def full_bytes(self) -> int:
        """What a device that has the base pulls in full, as far as the manifests tell: the layers
        behind those that both begin with, and the config.
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
"""A builder tells that what it makes can be read while it is written, and again whenever more is
known of it.
"""
Takes = Callable[[ExternalFile], bool]
"""Whether an client takes what is being written, as it stands."""


class Builder(Protocol):
    """Makes one kind of delta."""

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
        """Build, prove and publish; whatever it leaves behind on failure is swept by itself.

        ``low_memory``: with as little memory as it can, whatever that costs otherwise. A failed
        proof also costs the cached layers or trees that went into it their place: another attempt
        begins with fresh ones.
        """
