"""Forms of delta images, one for each compression of their layers: names, media types, tags, and
the engines that read them.

All other code asks a form for its properties, and names none. ``docs/architecture.md`` lists the
few other files that a new compression needs.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from obdelta.oci.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
)


@dataclass(frozen=True, slots=True)
class FormTraits:
    """The properties of a form.

    ``copy_type``: the media type of copies of shared layers, which are gzip'd tars in all forms.
    ``readers``: the engines that read the form, for help texts. ``first_engine``: the first major
    version of moby, and so of balena-engine, that reads it; ``first_os``: the first release of
    balenaOS with such a balena-engine. ``engine`` and ``os``: releases with no better form.
    """

    manifest_type: str
    config_type: str
    layer_type: str
    copy_type: str
    tag_suffix: str
    readers: str
    first_engine: int
    first_os: tuple[int, int, int]
    engine: str
    os: str


class Form(enum.Enum):
    """A pair of images may have a delta in each form.

    The order is that of preference: an engine that reads a form reads all forms before it, and
    pulls fewer bytes in a later one. For an engine that does not read a form, such a layer is not
    a tar.
    """

    GZIP = "gzip"
    ZSTD = "zstd"

    UNIVERSAL = GZIP
    """The form that every engine reads, that a balena-engine builds, and that v2 deltas count as.
    Records of earlier versions that name no form mean this one.
    """
    BEST = ZSTD

    @property
    def traits(self) -> FormTraits:
        """The form's properties."""
        return _TRAITS[self]

    @property
    def readable(self) -> tuple[Form, ...]:
        """The forms that an engine reads whose best form is this one, best first."""
        forms = tuple(Form)
        return forms[forms.index(self) :: -1]

    def best_of(self, forms: Collection[Form]) -> Form:
        """Returns the best one of ``forms`` for an engine whose best form is this one; the
        universal form if it reads none of them.
        """
        return next((form for form in self.readable if form in forms), Form.UNIVERSAL)

    @staticmethod
    def named(name: str | None) -> Form | None:
        """Returns the form of this name, or None."""
        return next((form for form in Form if form.value == name), None)

    @staticmethod
    def of_engine(major: int) -> Form:
        """Returns the best form that a major version of moby or balena-engine reads."""
        return [form for form in Form if form.traits.first_engine <= major][-1]

    @staticmethod
    def of_os(release: tuple[int, int, int]) -> Form:
        """Returns the best form that the engine of a release of balenaOS reads."""
        return [form for form in Form if form.traits.first_os <= release][-1]

    @staticmethod
    def of_tag(tag: str) -> Form:
        """Returns the form that a delta's tag names."""
        suffixed = (form for form in Form if form.traits.tag_suffix)
        found = (form for form in suffixed if tag.endswith(form.traits.tag_suffix))
        return next(found, Form.UNIVERSAL)

    @staticmethod
    def of_delta_blob(media_type: str) -> Form:
        """Returns the form of a delta image, from the media type of its config or a delta layer."""
        types = ((form, (form.traits.config_type, form.traits.layer_type)) for form in Form)
        return next((form for form, own in types if media_type in own), Form.UNIVERSAL)

    @staticmethod
    def of_layers(layers: Iterable[Descriptor]) -> Form:
        """Returns the best form that an engine must read to inflate the layers of any image. Types
        name their compression.
        """
        types = [layer.media_type for layer in layers]
        needed = [form for form in Form if any(form.value in each for each in types)]
        return needed[-1] if needed else Form.UNIVERSAL


_TRAITS = {
    Form.GZIP: FormTraits(
        manifest_type=DOCKER_MANIFEST,
        config_type=DOCKER_CONFIG,
        layer_type=DOCKER_LAYER,
        copy_type=DOCKER_LAYER,
        tag_suffix="",
        readers="every engine",
        first_engine=0,
        first_os=(0, 0, 0),
        engine="20.10.44",
        os="6.0.0",
    ),
    # Docker's schema has no type for zstd layers.
    Form.ZSTD: FormTraits(
        manifest_type=OCI_MANIFEST,
        config_type=OCI_CONFIG,
        layer_type="application/vnd.oci.image.layer.v1.tar+zstd",
        copy_type=OCI_LAYER_GZIP,
        tag_suffix="-zstd",
        readers="balena-engine 25 and later",
        first_engine=23,
        first_os=(7, 2, 0),
        engine="25.0.14",
        os="8.0.0",
    ),
}
