"""The operators' pages: escaped names, sections, progress, and advice."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.queue import Entry, FairQueue, Owner
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import Pair as BuildPair
from obdelta.oci import Descriptor, Digest, Manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import Outcome, Totals
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.markup import fragment, name
from obdelta.web.operators.pages.pair_page import content
from obdelta.web.operators.pages.status_page import (
    MAX_BUILDS,
    builds,
    progress_of,
    sections,
)
from obdelta.web.request_traces import RefusedClient
from tests.support.status_data import HOSTILE, a_failure, a_refusal, a_row, known


class Elements(HTMLParser):
    """Collects the names of all elements, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.names.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest_twisted.ensureDeferred
async def test_hostile_names_are_escaped() -> None:
    layer = {
        "target": f"sha256:{'d' * 64}",
        "size": 100,
        "explained": {
            "entries": 1,
            "changed": 1,
            "top": [
                {
                    "name": HOSTILE,
                    "size": 1,
                    "literal_bytes": 1,
                    "copied_bytes": 0,
                    "copies": 0,
                    "small_copies": 0,
                    "wire_bytes": 1,
                }
            ],
            "rest": None,
        },
    }
    refused = [RefusedClient(first=1.0, count=2, last=a_refusal())]
    pages = [
        *sections(known(refused=refused), []).values(),
        *content(a_row(layers=[layer], common=1), 5000.0),
    ]
    html = await fragment(*pages)
    found = Elements(html)
    assert "script" not in found.names
    assert found.text.count("<script>alert(1)</script>") >= 7
    assert not {"\x00", "\x1b", "\u202e"} & set(html)
    assert r"\x00\x1b\u202e\udcff\n" in found.text


@pytest_twisted.ensureDeferred
async def test_the_page_has_the_speed_of_devices() -> None:
    text = Elements(await fragment(sections(known(), [])["devices"])).text
    assert all(words in text for words in ("zstd", "1.8 Mbit/s", "210 µs", "34"))


@pytest_twisted.ensureDeferred
async def test_printable_names_are_not_changed() -> None:
    assert (
        await fragment(name("usr/lib/größe-日本.so"))
        == '<bdi class="name">usr/lib/größe-日本.so</bdi>'
    )


@pytest_twisted.ensureDeferred
async def test_a_new_server_has_a_page() -> None:
    empty = known(
        served=[],
        served_daily=[],
        recent=[],
        failures=[],
        fleets=[],
        counters={},
        totals=Totals(0, 0, 0),
        store={"deltas": 0},
        quota=0,
    )
    html = await fragment(*sections(replace(empty, problems={}), []).values())
    assert "Ready" in html
    assert "Nothing yet." in html
    assert "Not known yet: that takes 20 devices" in html
    assert "No failures." in html


def a_build(number: int, started: float | None, **progress: object) -> RunningBuild:
    image = Manifest(
        b"", DOCKER_MANIFEST, Digest(f"{number:064x}"), Descriptor("", Digest("0" * 64), 1), ()
    )
    resolved = ResolvedImage("v2/app", image)
    build = RunningBuild(
        BuildPair("v3", 1, resolved, resolved),
        0.0,
        Credentials.anonymous(),
        lambda: None,
        FairQueue(1, 0, Clock()),
        Entry(Owner("", ""), number, Deferred()),
    )
    build.started, build.progress = started, progress
    return build


@pytest_twisted.ensureDeferred
async def test_a_long_queue_is_shortened_and_running_builds_come_first() -> None:
    many = [a_build(number, None) for number in range(1000)]
    many.append(a_build(1000, 1.0, stage="match", layer=1, layers=4, done=50, of=100))
    html = await fragment(builds(many, 5.0))
    assert html.count("<tr") == MAX_BUILDS + 1
    assert html.index("layer 2 of 4: match 50 %") < html.index("queued")
    assert '<progress max="1" aria-label="Progress" value="0.375">' in html
    assert "And 951 more queued builds." in html


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (a_build(1, None), ("queued", None)),
        (a_build(1, 1.0), ("starting", None)),
        (a_build(1, 1.0, stage="fetch"), ("fetch", None)),
        (
            a_build(1, 1.0, stage="prove", layer=0, layers=2, done=0, of=0),
            ("layer 1 of 2: prove 0 %", 0.0),
        ),
        (
            a_build(1, 1.0, stage="match", layer=1, layers=2, done=9, of=3),
            ("layer 2 of 2: match 100 %", 1.0),
        ),
    ],
)
def test_progress_is_described_in_words(
    build: RunningBuild, expected: tuple[str, float | None]
) -> None:
    assert progress_of(build) == expected


@pytest_twisted.ensureDeferred
async def test_tables_have_captions_and_headings() -> None:
    html = await fragment(*sections(known(), []).values())
    assert html.count("<table") == html.count("<caption") == 4
    assert html.count('scope="row"') >= 3
    shown = html.count("<section") - html.count('hidden="hidden"')
    assert html.count("<h2") == html.count("aria-labelledby") == shown == 8


@pytest.mark.parametrize(
    ("outcome", "reason", "word"),
    [
        (Outcome.PROOF_FAILED, "x", "report"),
        (Outcome.TOO_LARGE, "the delta is too large: …", "max-delta-ratio"),
        (Outcome.UNUSABLE, "no delta can start from this base: …", "deltas from there on"),
        (Outcome.ERROR, "upstream registry: …", "/readyz"),
        (Outcome.ERROR, "unauthorized: …", "upstream-credentials and builder-token."),
        (Outcome.ERROR, "denied: …", "upstream-credentials and builder-token."),
        (Outcome.ERROR, "store: no space left", "store-quota"),
        (Outcome.ERROR, "build worker: out of memory", "worker-memory"),
        (Outcome.ERROR, "build worker: the build took more than 10 seconds", "build-timeout"),
        (Outcome.ERROR, "layer sha256:… is invalid: …", "push"),
        (Outcome.ERROR, "something new", "log"),
    ],
)
def test_advice_names_what_can_be_done(outcome: Outcome, reason: str, word: str) -> None:
    assert word in advice(a_failure(outcome, reason))
