"""Forms of delta images: their order, and how each is found."""

from __future__ import annotations

import pytest

from obdelta.builds.publish.delta_tags import DELTA_TAG, tag_in
from obdelta.delta.compress import WRITERS
from obdelta.delta.effort import COMMAND_MICROSECONDS, DEFAULT_PRICES, TUNINGS, UNPACKED_BYTES
from obdelta.oci import Descriptor, Digest, Form

PLAIN = "delta-0123456789abcdef"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def layer(compression: str) -> Descriptor:
    return Descriptor(LAYER + compression, Digest.of(b""), 1)


def test_the_universal_form_is_the_first_and_every_engine_reads_it() -> None:
    assert tuple(Form) == (Form.UNIVERSAL, Form.BEST)
    assert Form.of_engine(0) is Form.of_os((0, 0, 0)) is Form.UNIVERSAL
    assert all(form.readable[0] is form for form in Form)
    assert all(form.readable[-1] is Form.UNIVERSAL for form in Form)


def test_a_later_form_needs_newer_engines() -> None:
    engines = [(form.traits.first_engine, form.traits.first_os) for form in Form]
    assert engines == sorted(engines) and len(set(engines)) == len(engines)
    for form in Form:
        assert Form.of_engine(int(form.traits.engine.split(".")[0])) is form
        assert Form.of_engine(form.traits.first_engine) is form
        assert Form.of_os(form.traits.first_os) is form


def test_an_engine_gets_the_best_form_that_there_is_and_it_reads() -> None:
    assert Form.ZSTD.best_of(tuple(Form)) is Form.ZSTD
    assert Form.ZSTD.best_of([Form.GZIP]) is Form.GZIP
    assert Form.GZIP.best_of([Form.ZSTD]) is Form.GZIP


@pytest.mark.parametrize("form", Form)
def test_a_tag_names_its_form(form: Form) -> None:
    tag = tag_in(PLAIN, form)
    assert DELTA_TAG.fullmatch(tag) and Form.of_tag(tag) is form
    assert tag_in(tag) == PLAIN
    assert all(tag_in(tag_in(PLAIN, other), form) == tag for other in Form)


def test_tags_have_the_names_that_devices_were_given() -> None:
    assert {form: tag_in(PLAIN, form) for form in Form} == {
        Form.GZIP: PLAIN,
        Form.ZSTD: PLAIN + "-zstd",
    }
    assert DELTA_TAG.fullmatch(PLAIN + "-brotli") is None


@pytest.mark.parametrize("form", Form)
def test_media_types_name_their_form(form: Form) -> None:
    traits = form.traits
    assert Form.of_delta_blob(traits.config_type) is form
    assert Form.of_delta_blob(traits.layer_type) is form
    assert Form.of_delta_blob(traits.copy_type) is Form.UNIVERSAL


def test_layers_need_an_engine_that_inflates_all_of_them() -> None:
    assert Form.of_layers([]) is Form.of_layers([layer("")]) is Form.UNIVERSAL
    assert Form.of_layers([layer("+gzip"), layer("")]) is Form.GZIP
    assert Form.of_layers([layer("+zstd"), layer("+gzip")]) is Form.ZSTD


@pytest.mark.parametrize("name", [None, "", "Gzip", "brotli", "UNIVERSAL"])
def test_an_unknown_name_is_no_form(name: str | None) -> None:
    assert Form.named(name) is None


def test_every_form_has_a_compressor_its_parameters_and_prices() -> None:
    for table in (WRITERS, COMMAND_MICROSECONDS, UNPACKED_BYTES, DEFAULT_PRICES):
        assert list(table) == list(Form)
    assert all(list(tuning.compression) == list(Form) for tuning in TUNINGS.values())
