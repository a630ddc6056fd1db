"""Random requests for hypothesis: paths, queries, headers and methods."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.tokens import Issuer, pulls

ISSUER = Issuer()
TOKENS = (
    ISSUER.token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY)),
    ISSUER.token(pulls(BASE_REPOSITORY)),
    ISSUER.token([{**pulls(BASE_REPOSITORY)[0], "alias": "x"}]),
    Issuer().token(pulls(BASE_REPOSITORY, TARGET_REPOSITORY)),
)
PIECES = [
    "",
    "/",
    "//",
    "v2",
    "v2/",
    "api",
    "/api/v2/delta",
    "/api/v3/delta",
    "/api/v2/delta/download",
    "/healthz",
    "/readyz",
    "/api/v1/builds",
    "manifests",
    "blobs",
    "tags/list",
    "referrers",
    "latest",
    "..",
    ".",
    "%2e%2e",
    "%00",
    "%ff",
    "%",
    "%zz",
    "sha256:" + "0" * 64,
    "sha512:" + "0" * 128,
    "sha256:0",
    "delta-0123456789abcdef",
    "delta-" + "a1" * 16,
    BASE_REPOSITORY,
    TARGET_REPOSITORY,
    "x",
    "UPPER",
    "a" * 300,
    "uploads/",
    "?",
    "#",
    ";",
    "_catalog",
    "*",
]
PATHS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: "/" + "/".join(pieces)),
    st.tuples(
        st.sampled_from([BASE_REPOSITORY, TARGET_REPOSITORY, "x", "a/b"]),
        st.sampled_from(["manifests", "blobs", "tags", "referrers"]),
        st.sampled_from([*PIECES, "list"]),
    ).map(lambda parts: "/v2/" + "/".join(parts)),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40).map(
        lambda text: "/" + text
    ),
    st.sampled_from(
        ["/v2/", "/api/v2/delta", "/api/v3/delta", "/api/v2/delta/download", "/healthz"]
    ),
)
IMAGES = [
    "",
    "x",
    "{host}/" + BASE_REPOSITORY,
    "{host}/" + TARGET_REPOSITORY,
    BASE_REPOSITORY,
    TARGET_REPOSITORY,
    "{host}/x",
    "{host}/" + TARGET_REPOSITORY + ":latest",
    "{host}/" + TARGET_REPOSITORY + "@sha256:" + "0" * 64,
    "evil.example/x",
    "{host}/" + TARGET_REPOSITORY + ":delta-0123456789abcdef",
    "{host}/..",
    "%00",
    "%ff",
    "a" * 3000,
    "//",
    ":@",
    "-1",
    "1" * 13,
]
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "src",
                "dest",
                "wait",
                "base",
                "target",
                "recipe",
                "expires",
                "signature",
                "full-pull",
                "x",
                "%ff",
            ]
        ),
        st.sampled_from([*IMAGES, "true", "yes", "0" * 64, "1"]),
    ).map("=".join),
    max_size=6,
).map(lambda fields: "?" + "&".join(fields) if fields else "")
HEADERS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(f"Authorization: Bearer {token}" for token in TOKENS[1:]),
                "Authorization: Bearer a.b.c",
            ]
        ),
        st.sampled_from(
            [
                "Authorization: Basic Og==",
                "Authorization: Bearer",
                "Authorization:",
                "Expect: 100-continue",
            ]
        ),
        st.sampled_from(
            [
                "bytes=0-",
                "bytes=-0",
                "bytes=9-1",
                "bytes=99999999-",
                "bytes=0-0,2-3",
                "x",
                "bytes=-5",
            ]
        ).map(lambda value: f"Range: {value}"),
        st.sampled_from(
            [
                'If-None-Match: "x"',
                "If-Range: x",
                "If-Modified-Since: never",
                "Accept: */*",
                "Accept: x/y",
            ]
        ),
        st.sampled_from(
            [
                "User-Agent: Supervisor/17.0.0",
                "User-Agent: Supervisor/99999999999999999999.0.0",
                "Cookie: a",
            ]
        ),
        st.sampled_from(
            [
                "X-Forwarded-For: 1.2.3.4, nonsense",
                "X-Forwarded-Proto: \xff",
                "Host: \xff",
                "Connection: x",
            ]
        ),
        st.text(
            st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"),
            max_size=30,
        ).map(lambda text: f"X: {text}"),
    ),
    max_size=5,
)
METHODS = st.one_of(
    st.sampled_from(
        ["GET"] * 6
        + ["HEAD"] * 2
        + ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get"]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9),
)
