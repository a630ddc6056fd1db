"""Human names of images: fleet, service, release and commit, from labels and annotations.

Images inherit labels from the images that they are built from, so a name says what the image
claims; digests alone identify it. Sources: OCI image specification, ``annotations.md``; the labels
that balena's supervisor and builder, Docker Compose and Label Schema use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

MAX_NAME: Final = 64
"""Characters of each name."""

SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "fleet": (
        "io.balena.fleet",
        "io.balena.fleet-name",
        "io.balena.app-name",
        "io.resin.app-name",
        "com.docker.compose.project",
    ),
    "service": (
        "io.balena.service-name",
        "io.resin.service-name",
        "com.docker.compose.service",
        "org.opencontainers.image.title",
        "org.label-schema.name",
    ),
    "release": (
        "io.balena.release-version",
        "io.balena.release",
        "org.opencontainers.image.version",
        "org.label-schema.version",
    ),
    "commit": (
        "io.balena.release-commit",
        "io.balena.commit",
        "org.opencontainers.image.revision",
        "org.label-schema.vcs-ref",
    ),
}
"""Labels and annotations of each name, the best first."""
KEYS: Final = frozenset(key for keys in SOURCES.values() for key in keys)
_SHORT_COMMIT = 12


@dataclass(frozen=True, slots=True)
class ImageNames:
    """Names of one image, printable and at most :data:`MAX_NAME` characters each; "" if there is
    none.
    """

    fleet: str = ""
    service: str = ""
    release: str = ""
    commit: str = ""

    @classmethod
    def of(cls, fleet: str, service: str, release: str, commit: str) -> ImageNames:
        """Returns names from untrusted texts."""
        return cls(*map(_cleaned, (fleet, service, release, commit)))

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """Returns the names as one line: ``acme/web 1.4.2 (0a1b2c3d4e5f)``; "" without any."""
        parts = ["/".join(name for name in (self.fleet, self.service) if name), self.release]
        if self.commit:
            parts.append(f"({self.commit[:_SHORT_COMMIT]})")
        return " ".join(part for part in parts if part)

    @property
    def searchable(self) -> str:
        """The names for searches: as they are displayed, and the whole commit."""
        return f"{self} {self.commit}"

    def as_json(self) -> dict[str, str]:
        """Returns the names with their text."""
        named = {field.name: str(getattr(self, field.name)) for field in fields(self)}
        return named | {"text": str(self)}


def image_names(config: Mapping[str, Any], annotations: Mapping[str, str]) -> ImageNames:
    """Returns the names of an image from its parsed config and its manifest's annotations. Labels
    come first.
    """
    labels = _labels(config.get("config"))
    return ImageNames(
        **{
            name: next(
                (
                    text
                    for source in (labels, annotations)
                    for key in keys
                    if (text := _cleaned(source.get(key)))
                ),
                "",
            )
            for name, keys in SOURCES.items()
        }
    )


def known_annotations(value: object) -> dict[str, str]:
    """Returns the annotations of a manifest that hold a name, cleaned."""
    if not isinstance(value, dict):
        return {}
    return {key: text for key in KEYS if (text := _cleaned(value.get(key)))}


def _labels(config: object) -> Mapping[str, Any]:
    if not isinstance(config, dict):
        return {}
    labels = next((value for key, value in config.items() if key.casefold() == "labels"), None)
    return labels if isinstance(labels, dict) else {}


def _cleaned(value: object) -> str:
    """Returns untrusted text as one printable line of a bounded length."""
    if not isinstance(value, str):
        return ""
    # No more than what can be used is looked at.
    shown = "".join(char if char.isprintable() else " " for char in value[: 4 * MAX_NAME])
    shown = " ".join(shown.split())
    return shown if len(shown) <= MAX_NAME else shown[: MAX_NAME - 1] + "…"
