"""Credentials: whose are used; challenges, well-formed and hostile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.registry import Credentials, DeviceCredentials, OwnCredentials
from obdelta.registry.auth.tokens import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"Bearer abc.def-_~+/==", Credentials.bearer("abc.def-_~+/==")),
        (b"bearer   abc", Credentials.bearer("abc")),
        (b"Basic dTpw", Credentials.basic("u", "p")),
        (b"BASIC dTpwOng=", Credentials.basic("u", "p:x")),
        (b"Basic dTo=", Credentials.basic("u", "")),
        (None, Credentials.anonymous()),
        (b"", Credentials.anonymous()),
        (b"Bearer", Credentials.anonymous()),
        (b"Bearer a b", Credentials.anonymous()),
        (b"Bearer \xff", Credentials.anonymous()),
        (b"Basic !!!", Credentials.anonymous()),
        (b"Basic dQ==", Credentials.anonymous()),  # no colon
        (b"Basic dToNCg==", Credentials.anonymous()),  # a line break in the password
        (b"Basic " + b"/w==", Credentials.anonymous()),  # not UTF-8
        (b"Digest a=b", Credentials.anonymous()),
    ],
)
def test_authorization_headers_of_devices_are_parsed(
    header: bytes | None, expected: Credentials
) -> None:
    assert Credentials.from_header(header) == expected
    assert DeviceCredentials().credentials(header) == expected


@given(st.binary(max_size=200))
def test_any_header_is_parsed_or_refused(header: bytes) -> None:
    found = Credentials.from_header(header)
    sent = found.header()
    assert sent is None or (b"\r" not in sent and b"\n" not in sent)
    assert not found.exchange


def test_each_kind_of_credentials_is_sent_as_expected() -> None:
    assert Credentials.anonymous().header() is None
    assert Credentials.bearer("abc").header() == b"Bearer abc"
    assert Credentials.basic("u", "pä").header() == b"Basic dTpww6Q="


def test_secrets_are_in_no_repr() -> None:
    for credentials in (
        Credentials.bearer("s3cret"),
        Credentials.basic("us3r", "s3cret"),
        OwnCredentials.builder("s3cret"),
    ):
        assert "s3cret" not in repr(credentials) + str(credentials)


@pytest.mark.parametrize(("user", "password"), [("a:b", "c"), ("a", "c\r\nX: y"), ("a\x00", "c")])
def test_basic_credentials_with_invalid_characters_are_refused(user: str, password: str) -> None:
    with pytest.raises(ValueError, match="Basic"):
        Credentials.basic(user, password)


def test_each_policy_selects_its_credentials() -> None:
    header = b"Bearer of-a-device"
    assert DeviceCredentials().credentials(header) == Credentials.from_header(header)
    builder, nobody = OwnCredentials.builder("s3cret"), OwnCredentials.none()
    assert builder.credentials(header) == Credentials.basic("builder", "s3cret", exchange=True)
    assert nobody.credentials(header) == Credentials.anonymous(exchange=True)
    assert Credentials.basic("builder", "s3cret") != builder.credentials(
        None
    )  # these may not be exchanged


BEARER = Challenge(
    "bearer", {"realm": "https://a/t?x=1,2", "service": "r", "scope": "repository:a:pull,push"}
)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            [b'Bearer realm="https://a/t?x=1,2",service="r",scope="repository:a:pull,push"'],
            [BEARER],
        ),
        (
            [b'BEARER Realm = "https://a/t?x=1,2" , SERVICE=r,  scope="repository:a:pull,push"'],
            [BEARER],
        ),
        (
            [b'Basic realm="x, Bearer y=\\"z\\\\", Bearer realm=tok , service="s"'],
            [
                Challenge("basic", {"realm": 'x, Bearer y="z\\'}),
                Challenge("bearer", {"realm": "tok", "service": "s"}),
            ],
        ),
        (
            [b'Negotiate, Basic realm="a"'],
            [Challenge("negotiate"), Challenge("basic", {"realm": "a"})],
        ),
        (
            [b"NTLM TlRM==", b'Bearer realm="q"'],
            [Challenge("ntlm"), Challenge("bearer", {"realm": "q"})],
        ),
        (
            [b'Negotiate a/b+c==, Bearer realm="q"'],
            [Challenge("negotiate"), Challenge("bearer", {"realm": "q"})],
        ),
        ([b", ,Basic,,"], [Challenge("basic")]),
        ([b'Bearer realm="a",realm="b"'], [Challenge("bearer", {"realm": "a"})]),
        ([b'Bearer realm="a",,error="b"'], [Challenge("bearer", {"realm": "a", "error": "b"})]),
        # Nothing is read after a malformed part.
        ([b'Bearer realm="unterminated'], [Challenge("bearer")]),
        ([b'Bearer realm="a" service="b"'], [Challenge("bearer", {"realm": "a"})]),
        ([b'realm="x", Bearer realm="y"'], []),
        ([b"=", b'"', b"\xff", b""], []),
        ([b'Bearer realm="' + b"a" * 20_000 + b'"'], []),
        ([], []),
    ],
)
def test_challenges_are_parsed(headers: list[bytes], expected: list[Challenge]) -> None:
    assert parse_challenges(headers) == expected


TOKENS = st.text("abcXYZ019-._~", min_size=1, max_size=8)
VALUES = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20
)


@given(
    st.lists(
        st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), VALUES, min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_any_valid_challenge_is_parsed(written: list[tuple[str, dict[str, str]]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        scheme + " " + ", ".join(f"{name}={quoted(value)}" for name, value in parameters.items())
        for scheme, parameters in written
    )
    expected = [Challenge(scheme.lower(), parameters) for scheme, parameters in written]
    assert parse_challenges([header.encode("latin-1")]) == expected


@given(
    st.lists(
        st.text('Basicer =,"\\\t\x00é', max_size=60).map(lambda text: text.encode("latin-1")),
        max_size=3,
    )
)
def test_any_text_as_challenge_raises_nothing(headers: list[bytes]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme and challenge.scheme == challenge.scheme.lower()
