"""Access: a table of attacks with the exact status of each, tokens made by jsonwebtoken, and
random ones.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdelta.errors import Denied, Unauthorized
from obdelta.web.devices.access.admission import OpenAccess
from obdelta.web.devices.access.token_verifier import LEEWAY, Verifier
from tests.support.auth_attacks import (
    ACCESS,
    ATTACKS,
    BASE,
    BOTH,
    EDDSA,
    HONEST,
    NOW,
    OURS,
    REALM,
    RSA,
    SIBLING,
    TARGET,
    access_for,
    bearer,
    entry,
    good,
    raw,
    status,
)
from tests.support.tokens import AUDIENCE, node_tokens, pulls


@pytest.mark.parametrize(("header", "expected"), ATTACKS.values(), ids=ATTACKS.keys())
def test_each_attack_has_its_status(header: bytes | None, expected: int) -> None:
    assert status(header) == expected
    # A second request must not help: no refused token may be remembered as verified.
    assert status(header) == expected


@pytest.mark.parametrize("header", HONEST.values(), ids=HONEST.keys())
def test_valid_requests_are_accepted(header: bytes) -> None:
    assert status(header) == 200
    assert status(header) == 200


def test_each_attack_on_the_ping_has_its_status() -> None:
    """The ``/v2/`` ping accepts any valid token, and no invalid one."""
    for name, (header, expected) in ATTACKS.items():
        assert status(header, ()) == (200 if expected == 403 else 401), name


def test_tokens_of_jsonwebtoken() -> None:
    jobs = [
        OURS.node_job(BOTH, now=NOW),
        RSA.node_job(BOTH, now=NOW),
        SIBLING.node_job(BOTH, now=NOW),
    ]
    jobs += [OURS.node_job(pulls(BASE), now=NOW), OURS.node_job(BOTH, now=NOW, expiresIn=-3600)]
    es256, rs256, sibling, half, expired = (bearer(token) for token in node_tokens(jobs))
    assert status(es256) == 200
    assert [status(token) for token in (rs256, sibling, half, expired)] == [401, 401, 403, 401]
    assert status(rs256, access=access_for(RSA)) == 200
    assert [status(token, access=access_for(RSA)) for token in (es256, sibling)] == [401, 401]


def test_eddsa_is_accepted_where_configured() -> None:
    access = access_for(EDDSA)
    assert status(bearer(EDDSA.token(BOTH, now=NOW)), access=access) == 200
    assert status(bearer(good()), access=access) == 401


def test_the_kid_selects_one_of_several_keys() -> None:
    access = access_for(OURS, SIBLING)
    for issuer, other in ((OURS, SIBLING), (SIBLING, OURS)):
        assert status(bearer(issuer.token(BOTH, now=NOW)), access=access) == 200
        assert (
            status(bearer(issuer.token(BOTH, now=NOW, header={"kid": other.kid})), access=access)
            == 401
        )
        assert (
            status(bearer(issuer.token(BOTH, now=NOW, header={"kid": "gone"})), access=access)
            == 401
        )
        # openBalena gives its API the kid in base64, often with a file's line feed in it.
        assert (
            status(
                bearer(issuer.token(BOTH, now=NOW, header={"kid": issuer.kid + "\n"})),
                access=access,
            )
            == 200
        )


def test_the_challenge_names_realm_and_service() -> None:
    with pytest.raises(Unauthorized) as missing:
        ACCESS.authorize(None, [BASE, TARGET, BASE])
    assert (
        missing.value.challenge
        == f'Bearer realm="{REALM}",service="{AUDIENCE}",scope="repository:{BASE}:pull'
        f' repository:{TARGET}:pull"'
    )
    with pytest.raises(Unauthorized) as ping:
        ACCESS.authorize(None, [])
    assert ping.value.challenge == f'Bearer realm="{REALM}",service="{AUDIENCE}"'
    with pytest.raises(Unauthorized) as expired:
        ACCESS.authorize(bearer(good(exp=NOW - 3600)), [BASE])
    assert (
        expired.value.challenge == "Bearer"
        f' realm="{REALM}",service="{AUDIENCE}",scope="repository:{BASE}:pull"'
        ',error="invalid_token"'
    )
    with pytest.raises(Unauthorized) as injected:
        ACCESS.authorize(None, ['x",realm="https://evil.example', BASE])
    assert "evil" not in str(injected.value.challenge)


def test_a_token_grants_its_actions_only() -> None:
    alias = {"type": "repository", "name": TARGET, "actions": ["pull"], "alias": "org/app"}
    grant = ACCESS.authorize(bearer(good([*pulls(BASE), alias])), [])
    assert (grant.subject, grant.expires) == ("d_0123456789abcdef", NOW + 4 * 3600)
    assert grant.allows(BASE) and grant.allows(TARGET) and not grant.allows(TARGET, "push")
    assert not grant.allows("org/app")
    assert (grant.repository("org/app"), grant.repository(BASE), grant.repository("v2/x")) == (
        TARGET,
        BASE,
        "v2/x",
    )


def test_an_alias_counts_as_its_name_where_the_caller_resolves_it() -> None:
    alias = entry(alias="org/app")
    header = bearer(good([alias, *pulls(BASE)]))
    assert status(header, ["org/app"]) == 403
    assert ACCESS.authorize(header, ["org/app", BASE], aliases=True).repository("org/app") == TARGET
    for refused in (
        [entry(actions=[], alias="org/app")],  # an alias of what is not granted
        [alias, entry(name=BASE, alias="org/app")],  # an alias of two
    ):
        with pytest.raises(Denied):
            ACCESS.authorize(bearer(good(refused)), ["org/app"], aliases=True)
    # A granted repository keeps its own name, whatever an alias says.
    both = good([*pulls(BASE), entry(alias=BASE)])
    assert ACCESS.authorize(bearer(both), [BASE], aliases=True).repository(BASE) == BASE


def test_a_verified_token_is_remembered_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    time = [NOW]
    access = access_for(OURS, now=lambda: time[0])
    checked = []
    verify = Verifier._payload

    def counted(self: Verifier, *rest: Any) -> bytes | None:
        checked.append(rest)
        return verify(self, *rest)

    monkeypatch.setattr(Verifier, "_payload", counted)
    header = bearer(good(exp=NOW + 100))
    for _ in range(5):
        assert status(header, access=access) == 200
    assert len(checked) == 1
    assert status(header, ["v2/other"], access=access) == 403
    time[0] = NOW + 100 + LEEWAY - 1
    assert status(header, access=access) == 200
    time[0] = NOW + 100 + LEEWAY
    assert status(header, access=access) == 401
    assert len(checked) == 1
    assert status(header, access=access) == 401


def test_the_number_of_remembered_tokens_is_bounded() -> None:
    access = access_for(OURS)
    first = bearer(good(n=0))
    for n in range(1100):
        assert status(bearer(good(n=n)) if n else first, access=access) == 200
    assert len(access._verifier._cache) <= 1024


def test_open_access_reads_no_token() -> None:
    for header, _ in ATTACKS.values():
        grant = OpenAccess().authorize(header, [BASE, TARGET])
        assert grant.allows(BASE) and grant.allows("anything", "push") and grant.subject == ""


GOOD = good()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_changed_token_gets_in(data: st.DataObject) -> None:
    """Bytes are replaced, removed and added anywhere in an honest token."""
    token = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(token) - 1))
        token[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    header = b"Bearer " + bytes(token)
    expected = (
        200 if bytes(token).strip(b" \t") == GOOD.encode() else 401
    )  # blanks around it do not belong to the token
    assert status(header) == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("pull")
    | st.just(TARGET),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["access", "exp", "nbf", "iss", "aud", "sub"]), JSON)
def test_no_signed_claim_breaks_the_verifier(name: str, value: Any) -> None:
    """Any payload that the issuer signs gives a grant, a 401 or a 403, and never an unexpected
    error.
    """
    claims = {**OURS.claims(BOTH, now=NOW), name: value}
    assert status(bearer(raw(json.dumps(claims)))) in (200, 401, 403)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("repository"),
                "name": st.sampled_from(["a", "b", "a/b", "ab"]),
                "actions": st.lists(st.sampled_from(["pull", "push"])),
            },
            optional={"alias": st.sampled_from(["a", "b", "c"])},
        )
    )
)
def test_a_grant_is_exactly_what_the_entries_say(access: list[dict[str, Any]]) -> None:
    grant = ACCESS.authorize(bearer(good(access)), [])
    for name in ("a", "b", "a/b", "ab", "c"):
        for action in ("pull", "push"):
            listed = any(one["name"] == name and action in one["actions"] for one in access)
            assert grant.allows(name, action) == listed
