"""The nouns of the OCI specifications: digest, reference, descriptor, manifest, image config, chain
ID, form.
"""

from obdelta.oci.config import ImageConfig, parse_config
from obdelta.oci.digest import ChainID, DiffID, Digest, chain_ids, common_prefix
from obdelta.oci.filenames import printable_name
from obdelta.oci.form import Form
from obdelta.oci.image_names import ImageNames, image_names
from obdelta.oci.manifest import Descriptor, Index, Manifest, parse_manifest
from obdelta.oci.reference import Reference

__all__ = [
    "ChainID",
    "Descriptor",
    "DiffID",
    "Digest",
    "Form",
    "ImageConfig",
    "ImageNames",
    "Index",
    "Manifest",
    "Reference",
    "chain_ids",
    "common_prefix",
    "image_names",
    "parse_config",
    "parse_manifest",
    "printable_name",
]
