"""Names of images: from labels and annotations, cleaned and bounded."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.oci import ImageNames, Manifest, image_names, parse_manifest
from obdelta.oci.image_names import KEYS, MAX_NAME, known_annotations


def named(labels: Any, annotations: dict[str, str] | None = None) -> ImageNames:
    return image_names({"config": {"Labels": labels}}, annotations or {})


def test_labels_of_balena_come_before_those_of_oci_and_labels_before_annotations() -> None:
    found = named(
        {
            "io.balena.fleet-name": "acme",
            "io.balena.service-name": "web",
            "org.opencontainers.image.title": "debian",
            "org.opencontainers.image.version": "1.4.2",
        },
        {
            "org.opencontainers.image.version": "9",
            "org.opencontainers.image.revision": "0a1b2c3d4e5f6071",
        },
    )
    assert found == ImageNames("acme", "web", "1.4.2", "0a1b2c3d4e5f6071")
    assert str(found) == "acme/web 1.4.2 (0a1b2c3d4e5f)"
    assert found.as_json()["text"] == str(found)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (ImageNames(), ""),
        (ImageNames(service="web"), "web"),
        (ImageNames(release="1"), "1"),
        (ImageNames(fleet="acme", commit="abc"), "acme (abc)"),
    ],
)
def test_missing_names_leave_no_gap(names: ImageNames, text: str) -> None:
    assert str(names) == text
    assert bool(names) == bool(text)


def test_control_characters_and_direction_marks_are_no_part_of_a_name() -> None:
    assert named({"io.balena.fleet": " a\x1b[2Jb\u202ec\n d "}).fleet == "a [2Jb c d"


@pytest.mark.parametrize(
    "labels", [None, [], "x", {"io.balena.fleet": None}, {"io.balena.fleet": 3}]
)
def test_labels_that_are_no_text_are_ignored(labels: Any) -> None:
    assert not named(labels)


@given(st.text(max_size=400), st.sampled_from(sorted(KEYS)))
def test_any_text_becomes_one_printable_line_of_a_bounded_length(text: str, key: str) -> None:
    found = named({key: text})
    for name in (found.fleet, found.service, found.release, found.commit):
        assert len(name) <= MAX_NAME
        assert name.isprintable()
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") for char in name)


def test_a_manifest_keeps_only_annotations_that_name_the_image() -> None:
    descriptor = {"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}
    raw = {
        "schemaVersion": 2,
        "config": descriptor,
        "layers": [],
        "annotations": {"org.opencontainers.image.version": "1", "other": "x" * 999},
    }
    found = parse_manifest(json.dumps(raw).encode(), "application/vnd.oci.image.manifest.v1+json")
    assert isinstance(found, Manifest)
    assert found.annotations == {"org.opencontainers.image.version": "1"}
    assert known_annotations(["x"]) == {}
