"""The form of a delta that a client gets, by its User-Agent. An old engine never gets zstd."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.oci import Form
from obdelta.web.delta_form import engine_form, expected_form

REST = "go/go1.22 git-commit/abc kernel/6.6.20 os/linux arch/arm64"

READ_ZSTD = [
    f"balenaEngine/25.0.14 {REST}",
    f"balenaEngine/25.0.14-dev {REST}",
    f"balenaEngine/25.0.14+rev1 {REST}",
    f"balenaEngine/23.0.0 {REST}",
    f"balenaEngine/24.0.9 {REST}",
    f"balenaEngine/30.1.2 {REST}",
    f"balenaEngine/99.0.0 {REST}",
    f"docker/23.0.0 {REST}",
    f"docker/23.0.0-rc.1 {REST}",
    f"docker/24.0.0~3-0 {REST}",
    f"docker/25.0.14 {REST}",
    f"docker/26.1.5+dfsg1 {REST}",
    f"docker/28.3.3 {REST}",
    f"docker/29.0.0-beta.2 {REST}",
    "docker/25.0.14",
    # The words of the engine's caller have no effect.
    f"balenaEngine/25.0.14 {REST} UpstreamClient(Supervisor/19.0.5 \\(Linux; balenaOS 8.0.2\\))",
    f"balenaEngine/25.0.14 {REST} UpstreamClient(docker/20.10.5, balenaEngine/20.10.44)",
    f"docker/25.0.3 {REST} UpstreamClient(Docker-Client/20.10.7 \\(linux\\))",
]
OLD = [
    f"balenaEngine/20.10.44 {REST}",
    f"balenaEngine/20.10.17-dev {REST}",
    f"balenaEngine/19.03.30 {REST}",
    f"balenaEngine/18.9.10 {REST}",
    f"balenaEngine/17.13.5 {REST}",
    f"balenaEngine/22.6.0 {REST}",
    f"docker/20.10.25 {REST}",
    f"docker/20.10.5+dfsg1 {REST}",
    f"docker/19.03.15 {REST}",
    f"docker/18.09.1 {REST}",
    f"docker/17.06.0-ce {REST}",
    f"docker/1.13.1 {REST}",
    "docker/20.10.25",
    f"balenaEngine/20.10.44 {REST} UpstreamClient(balenaEngine/25.0.14)",
    f"docker/20.10.7 {REST} UpstreamClient(Docker-Client/25.0.1 \\(linux\\))",
    f"docker/20.10.7 {REST} UpstreamClient(docker/25.0.1 {REST})",
]
UNKNOWN = [
    # versions of builds without flags, and other words
    f"balenaEngine/library-import {REST}",
    f"docker/library-import {REST}",
    f"balenaEngine/dev {REST}",
    f"docker/unknown-version {REST}",
    f"docker/master-dockerproject-2022-01-01 {REST}",
    f"balenaEngine/v25.0.14 {REST}",
    # invalid versions
    f"balenaEngine/ {REST}",
    f"balenaEngine {REST}",
    f"balenaEngine/25 {REST}",
    f"balenaEngine/25.0 {REST}",
    f"balenaEngine/25.0.14.1 {REST}",
    f"balenaEngine/25.0.x {REST}",
    f"balenaEngine/-25.0.14 {REST}",
    f"balenaEngine/2025.10.1 {REST}",
    f"balenaEngine/250.0.14 {REST}",
    f"docker/25.0.14/20.10.5 {REST}",
    "docker/２５.０.１４",
    "docker/25.0.\u0661",
    # other clients, and those that only resemble an engine
    "",
    " ",
    "skopeo/1.18.0",
    "containers/5.36.2 (github.com/containers/image)",
    "containerd/2.0.2",
    "containerd/1.7.24+unknown",
    "buildkit/v0.12",
    "go-containerregistry/v0.20.2",
    "Go-http-client/1.1",
    "curl/8.14.1",
    "oras-go",
    "podman/5.4.2",
    "Mozilla/5.0 (X11; Linux x86_64)",
    "Supervisor/19.0.5 (Linux; balenaOS 8.0.2; prod)",
    "obdelta/0.2",
    f"BalenaEngine/25.0.14 {REST}",
    f"BALENAENGINE/25.0.14 {REST}",
    f"balenaengine/25.0.14 {REST}",
    f"Docker/25.0.14 {REST}",
    f"docker-ce/25.0.14 {REST}",
    f"mydocker/25.0.14 {REST}",
    f"go/go1.22 docker/25.0.14 {REST}",
    f"xx balenaEngine/25.0.14 {REST}",
    f"\tbalenaEngine/25.0.14 {REST}",
    f"UpstreamClient(balenaEngine/25.0.14 {REST})",
    f"Docker-Client/25.0.1 (linux) docker/25.0.14 {REST}",
    # two clients in one header
    f"balenaEngine/25.0.14 {REST}, balenaEngine/20.10.44 {REST}",
    f"balenaEngine/25.0.14 {REST},balenaEngine/20.10.44",
    f"balenaEngine/25.0.14 balenaEngine/20.10.44 {REST}",
    f"docker/25.0.14 docker/25.0.14 {REST}",
    f"docker/25.0.14;docker/20.10.5 {REST}",
    # control characters and other bytes
    f"balenaEngine/25.0.14\x00 {REST}",
    f"balenaEngine/25.0.14 {REST}\x7f",
    f"balenaEngine/25.0.14\r\nX: y {REST}",
    f"balenaEngine/25.0.14\n {REST}",
    f"balenaEngine/25.0.14\t{REST}",
    f"balenaEngine/25.0.14\x1b[31m {REST}",
    f"balenaEngine/25.0.14 {REST} \xe4",
    f"balenaEngine/25.0.14-{'9' * 100} {REST}",
    f"balenaEngine/25.0.{'9' * 400} {REST}",
]


def test_the_table_is_long_and_has_no_duplicates() -> None:
    table = READ_ZSTD + OLD + UNKNOWN
    assert len(table) == len(set(table)) >= 60


@pytest.mark.parametrize("text", READ_ZSTD)
def test_engines_that_read_zstd(text: str) -> None:
    assert engine_form([text.encode("latin-1")]) is Form.ZSTD


@pytest.mark.parametrize("text", OLD)
def test_engines_that_read_gzip_only(text: str) -> None:
    assert engine_form([text.encode("latin-1")]) is Form.GZIP


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_clients(text: str) -> None:
    assert engine_form([text.encode("utf-8", "surrogateescape")]) is None


@pytest.mark.parametrize("text", READ_ZSTD + OLD)
def test_no_header_or_two_headers_are_unknown(text: str) -> None:
    one = text.encode()
    assert engine_form([]) is engine_form([one, one]) is engine_form([one, b""]) is None
    assert engine_form([one, f"balenaEngine/20.10.44 {REST}".encode()]) is None
    for joined in (b", ", b"; ", b" ", b") "):
        two = one + b" UpstreamClient(a)" + joined + f"balenaEngine/20.10.44 {REST}".encode()
        assert engine_form([two]) is None


@given(st.binary(max_size=60), st.sampled_from(OLD))
def test_text_after_an_old_engine_does_not_make_it_new(more: bytes, text: str) -> None:
    assert engine_form([text.encode() + b" " + more]) is not Form.ZSTD


@given(st.lists(st.binary(max_size=80), max_size=3))
def test_any_bytes_have_an_answer(headers: list[bytes]) -> None:
    assert engine_form(headers) in (*Form, None)
    assert expected_form(headers) in (*Form, None)


@pytest.mark.parametrize(
    "text",
    [
        "Supervisor/17.5.2 (Linux; balenaOS 7.2.0; prod)",
        "Supervisor/19.0.5 (Linux; balenaOS 8.0.2; dev)",
        "Supervisor/19.0.5 (Linux; balenaOS 8.0.2)",
        "Supervisor/19.0.5 (Linux; balenaOS 7.10.0+rev1; prod)",
        "Supervisor/19.0.5-rc.1 (Linux; balenaOS 30.0.0; prod)",
    ],
)
def test_systems_with_an_engine_that_reads_zstd(text: str) -> None:
    assert expected_form([text.encode()]) is Form.ZSTD


@pytest.mark.parametrize(
    "text",
    [
        "Supervisor/17.5.2 (Linux; balenaOS 7.1.9; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 6.12.3+rev2; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 2.98.33; prod)",
    ],
)
def test_systems_whose_engine_is_old(text: str) -> None:
    assert expected_form([text.encode()]) is Form.GZIP


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Supervisor/17.5.2",
        "Supervisor/17.5.2 (Linux)",
        "Supervisor/17.5.2 (Linux; balenaOS 7.2.0-1700000000; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 7.2; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 2025.10.1; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 2000.0.0; prod)",
        "Supervisor/17.5.2 (Linux; resinOS 8.0.2; prod)",
        "Supervisor/17.5.2 (Linux; Debian 13.0.0; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS unknown; prod)",
        "Supervisor/17.5.2 (Linux; undefined; undefined)",
        "supervisor/17.5.2 (Linux; balenaOS 8.0.2; prod)",
        "x Supervisor/17.5.2 (Linux; balenaOS 8.0.2; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 8.0.2; prod) (Linux; balenaOS 6.0.0; prod)",
        "Supervisor/17.5.2 (Linux; balenaOS 8.0.2; prod), Supervisor/14 (Linux; balenaOS 2.1.0)",
        "Supervisor/17.5.2 (Linux; balenaOS 8.0.2; prod)\x00",
    ],
)
def test_systems_whose_engine_is_not_known(text: str) -> None:
    assert expected_form([text.encode()]) is None


def test_two_supervisors_in_one_request_are_not_known() -> None:
    header = b"Supervisor/19.0.5 (Linux; balenaOS 8.0.2; prod)"
    assert expected_form([header]) is Form.ZSTD
    assert expected_form([header, header]) is expected_form([]) is None
