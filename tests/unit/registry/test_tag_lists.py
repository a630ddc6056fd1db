"""Lists of tags that a registry sends in pages (a double: tests/support/hostile.py)."""

from __future__ import annotations

import json

import pytest
import pytest_twisted

from obdelta.errors import UpstreamUnavailable
from obdelta.registry import Credentials
from tests.support.clients import client_of
from tests.support.hostile import Answer, hostile_upstream, response

REPOSITORY = "v2/app"
LIST = f"/v2/{REPOSITORY}/tags/list"


def page(*tags: str, following: str) -> Answer:
    body = json.dumps({"name": REPOSITORY, "tags": [*tags]}).encode()
    link = f'<{LIST}?n=1000&last={following}>; rel="next"'
    return response(200, body, content_type="application/json", link=link)


@pytest.mark.parametrize("tags", [(), ("a", "b")], ids=["empty pages", "the same tags"])
@pytest_twisted.ensureDeferred
async def test_a_list_of_tags_that_never_ends_is_refused(tags: tuple[str, ...]) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(LIST, *[page(*tags, following="b")] * 5, response(404))
        with pytest.raises(UpstreamUnavailable, match="does not end"):
            await client.remover().tags(REPOSITORY, Credentials.anonymous())
        assert len(upstream.seen) <= 2


@pytest_twisted.ensureDeferred
async def test_all_pages_of_a_list_of_tags_are_read_once() -> None:
    last = response(200, b'{"tags": ["b", "c"]}', content_type="application/json")
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(LIST, page("a", "b", following="b"), last)
        tags = await client.remover().tags(REPOSITORY, Credentials.anonymous())
    assert tags == ["a", "b", "c"]
