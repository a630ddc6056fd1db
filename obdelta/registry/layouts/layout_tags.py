"""Tags in an OCI image layout: parsed from annotations, and matched with the requested one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from obdelta.errors import BadReference, ManifestUnknown
from obdelta.oci import Descriptor, Digest, Reference
from obdelta.oci.reference import is_tag

_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class TagName:
    """A tag, and the repository of its full name, if it was one."""

    tag: str
    repository: str = ""


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """One manifest that ``index.json`` lists."""

    descriptor: Descriptor
    names: tuple[TagName, ...]
    no_image: bool


def parse_name(annotation: object) -> TagName | None:
    """Parses an annotation: ``1.0``, ``registry.example.com/app:1.0``, ``docker.io/library/app``
    (its ``latest``).
    """
    if not isinstance(annotation, str):
        return None
    if is_tag(annotation):
        return TagName(annotation)
    try:
        reference = Reference.parse(annotation)
    except BadReference:
        return None
    if reference.tag is None and reference.digest is not None:
        return None
    return TagName(reference.tag or "latest", reference.repository)


def find_tag(repository: str, tag: str, entries: list[LayoutEntry]) -> Descriptor:
    """Returns the manifest of a tag; ManifestUnknown lists the existing ones."""
    named = {
        entry.descriptor.digest: (name, entry.descriptor)
        for entry in reversed(entries)
        for name in entry.names
        if name.tag == tag
    }
    # Full names of other repositories count only if no name fits better.
    for fits in (
        lambda name: name.repository in ("", repository),
        lambda name: name.repository.rpartition("/")[2] == repository.rpartition("/")[2],
        lambda name: len(named) == 1,
    ):
        if found := [descriptor for name, descriptor in named.values() if fits(name)]:
            return found[-1]
    unnamed = {
        entry.descriptor.digest: entry.descriptor
        for entry in entries
        if not entry.names and not entry.no_image
    }
    if tag == "latest" and len(unnamed) == 1 and not named:
        return next(iter(unnamed.values()))
    raise ManifestUnknown(repository, tag, _listed(entries, list(unnamed)))


def _listed(entries: list[LayoutEntry], unnamed: list[Digest]) -> str:
    names = sorted(
        {
            f"{name.repository}:{name.tag}" if name.repository else name.tag
            for entry in entries
            for name in entry.names
        }
    )
    there = []
    if names:
        there.append("the tags " + _listing_of(names))
    if unnamed:
        there.append("images without a tag: " + _listing_of(map(str, unnamed)))
    return " and ".join(there) or "no images"


def _listing_of(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - _MAX_LISTED
    return ", ".join(listed[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
