"""The nouns of the OCI specifications: digest, reference, descriptor, manifest, image config, chain
ID.
"""

from obdelta.oci.config import ImageConfig, parse_config
from obdelta.oci.digest import ChainID, DiffID, Digest, chain_ids, common_prefix
from obdelta.oci.filenames import shown
from obdelta.oci.manifest import Descriptor, Index, Manifest, parse_manifest
from obdelta.oci.reference import Reference

__all__ = [
    "ChainID",
    "Descriptor",
    "DiffID",
    "Digest",
    "ImageConfig",
    "Index",
    "Manifest",
    "Reference",
    "chain_ids",
    "common_prefix",
    "parse_config",
    "parse_manifest",
    "shown",
]
