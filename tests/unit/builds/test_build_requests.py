"""Requests and results in Redis: what a frontend writes a worker reads, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from obdelta import errors
from obdelta.builds.delta_size_limit import DeltaTooLarge
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.types import BuildCancelled, Pair
from obdelta.builds.verdicts import FailedElsewhere
from obdelta.builds.workers.build_requests import (
    BuildRequest,
    read_request,
    result_of_error,
    result_of_row,
    row_of_result,
)
from obdelta.errors import ObdeltaError
from obdelta.oci import Digest, Form
from obdelta.store.catalogue.records import Outcome
from tests.support.build_service import manifest_of, row_of


@pytest.fixture
def pair() -> Pair:
    base, target = (
        ResolvedImage(repository, manifest_of(repository)) for repository in ("org/base", "org/app")
    )
    return Pair("v3", 7, base, target)


REQUEST = BuildRequest(
    "v3", 7, "org/base", Digest.of(b"base"), "org/app", Digest.of(b"target"), Form.ZSTD
)


def test_a_request_survives_redis() -> None:
    assert read_request(REQUEST.as_json()) == REQUEST
    assert read_request(REQUEST.as_json()).name == REQUEST.name  # type: ignore[union-attr]
    batch = replace(REQUEST, kind="v2", form=Form.GZIP)
    assert read_request(batch.as_json()) == batch and batch.name != REQUEST.name


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "v2"},  # a batch has no other form
        {"kind": "v4"},
        {"kind": ["v3"]},
        {"recipe": "7"},
        {"recipe": True},
        {"base": "sha256:0"},
        {"target_repository": "../etc"},
        {"target_repository": "a b"},
        {"base_repository": 3},
        {"form": "lzma"},
        {"form": None},
    ],
)
def test_text_that_no_frontend_writes_is_no_request(change: dict[str, object]) -> None:
    assert read_request({**REQUEST.as_json(), **change}) is None


@pytest.mark.parametrize("found", [None, [], "text", {}, {"kind": "v3"}])
def test_other_json_is_no_request(found: object) -> None:
    assert read_request(found) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeltaTooLarge(9, 10), DeltaTooLarge),
        (errors.WorkTooLong("it took 9 seconds"), errors.WorkTooLong),
        (errors.LayerInvalid("x", "no tar"), errors.ImageUnusable),
        (errors.BlobUnknown("x"), errors.Missing),
        (errors.UpstreamBusy(3), errors.Unavailable),
        # A worker's credentials are no fault of a device.
        (errors.Unauthorized("a token is needed"), errors.Unavailable),
        (FailedElsewhere(Outcome.UNUSABLE, "no tar"), FailedElsewhere),
        (BuildCancelled(), BuildCancelled),
    ],
)
def test_an_error_keeps_its_class_and_text(
    error: ObdeltaError, kind: type[ObdeltaError], pair: Pair
) -> None:
    with pytest.raises(ObdeltaError) as raised:
        row_of_result(result_of_error(error), pair)
    assert type(raised.value) is kind and str(raised.value) == str(error)


@pytest.mark.parametrize(
    "found", [None, [], {"row": "{"}, {"row": 3}, {"error": "SystemExit"}, {"outcome": "gone"}]
)
def test_text_that_no_worker_writes_is_no_result(found: object, pair: Pair) -> None:
    with pytest.raises(errors.Unavailable):
        row_of_result(found, pair)


def test_a_delta_of_another_pair_is_no_result(pair: Pair) -> None:
    row = row_of(pair)
    assert row_of_result(result_of_row(row), pair).content == row.content
    with pytest.raises(errors.Unavailable):
        row_of_result(result_of_row(row_of(pair.in_form(Form.ZSTD))), pair)
