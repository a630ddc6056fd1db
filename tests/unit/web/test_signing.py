"""Download URLs: accepted only if signed here, unchanged and in time."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.errors import Denied, SettingsError
from obdelta.oci import Digest
from obdelta.store.catalogue.records import DeltaKey
from obdelta.store.ownership import KEY_BYTES
from obdelta.web.devices.access.signed_urls import Ticket, UrlSigner, derive_key, load_key

PAIR = DeltaKey("v2", 3, Digest.of(b"base"), Digest.of(b"target"))
TICKET = Ticket(PAIR, "0a" * 16, 12345, repository="v2/" + "b2" * 16)
NOW = 1_700_000_000.0


def signer(key: bytes = b"k" * KEY_BYTES, now: float = NOW) -> UrlSigner:
    return UrlSigner(key, lambda: now, 3600)


def parsed(query: str) -> dict[bytes, list[bytes]]:
    return {k: list(v) for k, v in parse_qs(query.encode("ascii"), keep_blank_values=True).items()}


def test_a_signed_url_is_accepted_until_it_expires() -> None:
    query = parsed(signer().sign(TICKET))
    assert signer().check(query) == TICKET
    assert signer(now=NOW + 3600).check(query) == TICKET
    with pytest.raises(Denied, match="expired"):
        signer(now=NOW + 3601).check(query)


def test_another_key_is_refused() -> None:
    with pytest.raises(Denied, match="not made here"):
        signer(b"x" * KEY_BYTES).check(parsed(signer().sign(TICKET)))


@pytest.mark.parametrize(
    "name",
    ["base", "target", "recipe", "made", "length", "delay", "expires", "repository", "signature"],
)
@pytest.mark.parametrize(
    "change", ["missing", "doubled", "altered", "empty", "path", "other script"]
)
def test_any_change_is_refused(name: str, change: str) -> None:
    query = parsed(signer().sign(TICKET))
    value = query[name.encode()][0]
    altered = {
        "missing": [],
        "doubled": [value, value],
        "altered": [bytes([value[0] ^ 1]) + value[1:]],
        "empty": [b""],
        "path": [b"../../etc/passwd"],
        "other script": ["٣".encode() + value[1:]],
    }[change]
    query[name.encode()] = altered
    with pytest.raises(Denied):
        signer().check({k: v for k, v in query.items() if v})


def test_a_url_without_a_repository_is_one_of_its_own() -> None:
    here = TICKET._replace(repository="")
    query = parsed(signer().sign(here))
    assert b"repository" not in query and signer().check(query) == here
    with pytest.raises(Denied):
        signer().check({**query, b"repository": [TICKET.repository.encode()]})


def test_servers_with_one_secret_have_one_key() -> None:
    assert derive_key("s3cret") == derive_key("s3cret") != derive_key("s3cret ")
    assert len(derive_key("s3cret")) == KEY_BYTES


def test_an_additional_parameter_is_refused() -> None:
    with pytest.raises(Denied):
        signer().check(parsed(signer().sign(TICKET) + "&delta=../../x"))


def test_a_signature_for_another_pair_is_refused() -> None:
    query = parsed(signer().sign(TICKET))
    other = parsed(signer().sign(TICKET._replace(key=DeltaKey("v2", 3, PAIR.target, PAIR.base))))
    with pytest.raises(Denied):
        signer().check({**query, b"base": other[b"base"], b"target": other[b"target"]})


@pytest.mark.parametrize(
    "other",
    [TICKET._replace(made="0b" * 16), TICKET._replace(length=12346), TICKET._replace(delay=1)],
)
def test_a_signature_for_another_build_or_length_is_refused(other: Ticket) -> None:
    query = parsed(signer().sign(TICKET))
    changed = parsed(signer().sign(other))
    with pytest.raises(Denied):
        signer().check({**changed, b"signature": query[b"signature"]})


@given(
    st.dictionaries(
        st.binary(max_size=12), st.lists(st.binary(max_size=70), max_size=3), max_size=6
    )
)
def test_any_query_is_refused_cleanly(query: dict[bytes, list[bytes]]) -> None:
    with pytest.raises(Denied):
        signer().check(query)


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "url-key"
    key = load_key(path)
    assert len(key) == KEY_BYTES
    assert load_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["url-key"]


def test_an_invalid_key_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "url-key").write_bytes(b"short")
    with pytest.raises(SettingsError, match="url-key"):
        load_key(tmp_path / "url-key")
