"""The form of a delta image: how its layers are compressed."""

from __future__ import annotations

import enum

from obdelta.oci.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
)


class Form(enum.Enum):
    """A pair of images may have a delta in each form.

    Every engine reads ``GZIP``. balena-engine 25 and moby from 23 on read ``ZSTD`` too; for older
    engines such a layer is not a tar.
    """

    GZIP = "gzip"
    ZSTD = "zstd"

    @property
    def manifest_type(self) -> str:
        """The media type of the image's manifest. Docker's schema has no type for zstd layers."""
        return DOCKER_MANIFEST if self is Form.GZIP else OCI_MANIFEST

    @property
    def config_type(self) -> str:
        """The media type of the image's config."""
        return DOCKER_CONFIG if self is Form.GZIP else OCI_CONFIG

    @property
    def layer_type(self) -> str:
        """The media type of the delta layers."""
        return DOCKER_LAYER if self is Form.GZIP else OCI_LAYER_ZSTD

    @property
    def copy_type(self) -> str:
        """The media type of the copies of shared layers, which are gzip'd tars in both forms."""
        return DOCKER_LAYER if self is Form.GZIP else OCI_LAYER_GZIP
