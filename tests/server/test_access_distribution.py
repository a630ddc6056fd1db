"""Our verdict on every token of the table, compared with that of Debian's real docker-registry
with the same certificate.
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest

from tests.support.auth_attacks import ATTACKS, BASE, HONEST, OURS, REALM, status
from tests.support.registry import running_registry
from tests.support.tokens import AUDIENCE, ISSUER

STRICTER = {
    "padding",  # RFC 7515 allows none
    "loose bits in the signature",
    "over the size",
    "an unknown critical header",  # RFC 7515, section 4.1.11: must be refused
    "all actions by a star",  # openBalena's API never issues it
    "exp at the bound",  # times from 1e11 on are no dates, and a database cannot add to them
    "nbf of no date",
}
LAXER = {
    "more blanks",
    "audience in a list",  # RFC 7519, section 4.1.3; newer versions of distribution take it
    "fractions of seconds",  # RFC 7519, section 2
    "kid unknown, with one key",  # the signature says whether it is that key's
}
CLOCK = {"expired within the leeway", "early within the leeway"}
"""The tokens' times are exact to the second; the registry uses the real clock."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "api.pem").write_bytes(OURS.certificate)
    auth = {
        "realm": REALM,
        "service": AUDIENCE,
        "issuer": ISSUER,
        "rootcertbundle": str(folder / "api.pem"),
    }
    with running_registry(folder / "state", auth={"token": auth}) as running:
        yield running.host


def allowed(host: str, header: bytes | None) -> bool:
    """Returns whether the registry looks for a manifest in the repository; it has none."""
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.putrequest("GET", f"/v2/{BASE}/manifests/latest")
        if header is not None:
            connection.putheader("Authorization", header)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
    finally:
        connection.close()
    assert answer.status in (400, 401, 404, 431)
    return answer.status == 404


def test_access_decisions_equal_those_of_distribution_with_listed_exceptions(registry: str) -> None:
    table = {**HONEST, **{name: header for name, (header, _) in ATTACKS.items()}}
    ours, distributions = set(), set()
    for name, header in table.items():
        if name in CLOCK or (header is not None and b"\n" in header):
            continue
        if status(header, [BASE]) == 200:
            ours.add(name)
        if allowed(registry, header):
            distributions.add(name)
    assert distributions - ours == STRICTER
    assert ours - distributions == LAXER
