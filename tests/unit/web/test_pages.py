"""The operators' pages in a real browser during a real build, and what they are made of."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import pytest_twisted
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from obdelta.builds.device_estimates import DeviceEstimate, FleetEstimate
from obdelta.builds.inputs.image_lookup import ResolvedImage
from obdelta.builds.queue import Entry, FairQueue, Owner
from obdelta.builds.running_build import RunningBuild
from obdelta.builds.types import Pair as BuildPair
from obdelta.oci import Descriptor, Digest, Form, Manifest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import Credentials
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, FailureRow, Outcome, Totals
from obdelta.store.catalogue.tables.history import HOUR, Served
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.markup import fragment, name
from obdelta.web.operators.pages.pair_page import content
from obdelta.web.operators.pages.plot import saved_over_time, use_of_store
from obdelta.web.operators.pages.sections.status_data import StatusData
from obdelta.web.operators.pages.status_page import (
    MAX_BUILDS,
    builds,
    progress_of,
    sections,
)
from obdelta.web.request_traces import RefusedClient, RequestTrace
from tests.server.test_v3 import update
from tests.support.browser import browser
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server

CHECK_TIMEOUT = 60
WATCH = """
window.seen = [];
new MutationObserver(() => {
    const text = document.getElementById("builds").innerText;
    if (text !== window.seen.at(-1)) window.seen.push(text);
}).observe(document.querySelector("main"), {childList: true, subtree: true});
window.unloaded = false;
"""

MEASURE = """
const shown = [...document.querySelectorAll("main :not(thead *, svg *)")];
return [
    document.documentElement.scrollWidth,
    getComputedStyle(document.body).backgroundColor,
    Math.max(...shown.map((one) => one.getBoundingClientRect().right)),
];
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=96 << 20)


def text_of(page: Chrome, section: str) -> str:
    # In one step, because sections are replaced meanwhile.
    return str(
        page.execute_script("return document.getElementById(arguments[0]).innerText", section)
    )


def open_newest(page: Chrome) -> None:
    page.execute_script("document.querySelector('#deltas tbody a').click()")
    wait_for(page, lambda _: "/pairs/v3/" in page.current_url and text_of(page, "files") != "")


def wait_for(page: Chrome, condition: Callable[[Chrome], bool]) -> None:
    WebDriverWait(page, CHECK_TIMEOUT).until(condition)


def faults(page: Chrome) -> list[str]:
    """Returns the browser's console: a refused style, script or request would be there."""
    return [str(entry["message"]) for entry in page.get_log("browser")]  # type: ignore[no-untyped-call] # selenium's


def get(server: RunningServer, path: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(server.operator_url.rpartition(":")[2]), timeout=30
    )
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return (
            answer.status,
            {key.lower(): value for key, value in answer.getheaders()},
            answer.read().decode(),
        )
    finally:
        connection.close()


def test_the_page_follows_a_build(pair: Pair, tmp_path: Path) -> None:
    with (
        running_server(tmp_path / "state", upstream=f"oci:{pair.root}", effort="small") as server,
        browser(tmp_path / "profile") as page,
    ):
        page.get(f"{server.operator_url}/")
        assert text_of(page, "state") == "Ready"
        assert "None. A build starts when a device requests a delta." in text_of(page, "builds")
        page.execute_script(WATCH)
        assert update(server, tmp_path / "device").is_delta
        wait_for(page, lambda _: TARGET_REPOSITORY in text_of(page, "deltas"))
        wait_for(page, lambda _: "None." in text_of(page, "builds"))
        wait_for(page, lambda _: "Deltas served\n1" in text_of(page, "summary"))
        # All of this without a reload of the page.
        assert page.execute_script("return window.unloaded") is False
        seen = page.execute_script("return window.seen")
        building = [text for text in seen if TARGET_REPOSITORY in text]
        steps = {
            line
            for text in building
            for line in text.splitlines()
            if line.startswith(("fetch", "layer "))
        }
        assert len(steps) >= 2, seen
        assert any(step.startswith("layer ") and step.endswith("%") for step in steps), steps
        open_newest(page)
        assert page.find_element(By.TAG_NAME, "h1").text == TARGET_REPOSITORY
        assert "usr/lib/modules/added.txt" in text_of(page, "files")
        assert "Device disk needed" in page.page_source
        assert faults(page) == []
        without_scripts(server, tmp_path)
        on_a_phone(server, tmp_path)
        nothing_from_other_hosts(server)


def without_scripts(server: RunningServer, tmp_path: Path) -> None:
    with browser(tmp_path / "profile without scripts", scripts=False) as page:
        page.get(f"{server.operator_url}/")
        assert TARGET_REPOSITORY in text_of(page, "deltas")
        # Only without scripts are the contents of noscript elements.
        assert (
            page.find_element(By.CSS_SELECTOR, "noscript > meta").get_attribute("http-equiv")
            == "refresh"
        )
        page.find_element(By.CSS_SELECTOR, "#deltas tbody a").click()
        assert page.find_element(By.TAG_NAME, "h1").text == TARGET_REPOSITORY
        assert faults(page) == []


def on_a_phone(server: RunningServer, tmp_path: Path) -> None:
    with browser(tmp_path / "profile of a phone", width=390, height=844, dark=True) as page:
        page.get(f"{server.operator_url}/")
        # In one step: an event may replace the section at any time.
        link = page.execute_script("return document.querySelector('#deltas tbody a').href")
        for address in (page.current_url, link):
            page.get(str(address))
            width, ground, right = page.execute_script(MEASURE)
            assert width <= 390
            assert right <= 390
            assert ground == "rgb(17, 22, 27)"


def nothing_from_other_hosts(server: RunningServer) -> None:
    status, headers, page = get(server, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert "http://" not in page and "https://" not in page
    assert "style=" not in page
    kept = get(server, "/pages/page.css")
    assert (kept[0], kept[1]["content-type"]) == (200, "text/css; charset=utf-8")
    for path in ("v3/1/zz/zz", f"v4/1/{'0' * 64}/{'0' * 64}", f"v3/x/{'0' * 64}/{'0' * 64}"):
        assert get(server, f"/pairs/{path}")[0] == 400, path
    assert get(server, f"/pairs/v3/1/{'0' * 64}/{'0' * 64}")[0] == 404


# -- what pages are made of --------------------------------------------------------------------

HOSTILE = "v2/<script>alert(1)</script>\"'&\x00\x1b\u202e\udcff\n\u0000</bdi>"


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


def a_row(**details: object) -> DeltaRow:
    return DeltaRow(
        DeltaKey("v3", 1, Digest("a" * 64), Digest("b" * 64)),
        HOSTILE,
        HOSTILE + "2",
        "delta-0123456789abcdef",
        Digest("c" * 64),
        1_000_000,
        50_000,
        2.5,
        1000,
        details=details,
    )


def a_failure(outcome: Outcome, reason: str) -> FailureRow:
    return FailureRow(
        "v3", Digest("a" * 64), Digest("b" * 64), outcome, reason, 3, 900, HOSTILE, HOSTILE
    )


def a_refusal() -> RequestTrace:
    return RequestTrace(
        when=900.0,
        request="0123456789abcdef",
        peer="192.0.2.7",
        subject=HOSTILE,
        token=True,
        method="GET",
        path="/v2/",
        image=HOSTILE,
        status=403,
        bytes=0,
        seconds=0.1,
        end="done",
        reason=HOSTILE,
    )


def known(**changed: object) -> StatusData:
    value = StatusData(
        now=5000.0,
        clock=5000.0,
        devices=3,
        totals=Totals(1, 2, 60_000),
        counters={
            "served.v3.full_bytes": 10_000_000,
            "served.v3.delta_bytes": 500_000,
            "served.v3.deltas": 10,
        },
        served=[Served(0, 10, 10_000_000, 500_000)],
        served_daily=[Served(0, 10, 10_000_000, 500_000)],
        recent=[a_row()],
        failures=[a_failure(Outcome.ERROR, f"upstream registry: {HOSTILE}")],
        store={"deltas": 60_000, "layers": 1_000_000, "trees": 0},
        quota=2_000_000,
        problems={"upstream": HOSTILE, "store": None},
        fleets=[FleetEstimate(HOSTILE, Form.ZSTD, DeviceEstimate(1_800_000, 210, 34))],
    )
    return replace(value, **changed)  # type: ignore[arg-type] # whatever a test names


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


@pytest_twisted.ensureDeferred
async def test_a_plot_has_a_bar_a_step_and_its_figures_as_a_table() -> None:
    now = 100 * 24 * HOUR + 1800.0
    hours = [Served(int(now) // HOUR * HOUR, 2, 4_000_000, 1_000_000)]
    by_hour = await fragment(saved_over_time(hours, [Served(100 * 24 * HOUR, 2, 1, 1)], now))
    assert by_hour.count('<rect class="sent"') == 2  # one of them explains the colour
    assert "by hour, 1970-04-09 01:00 to 1970-04-11 01:00 UTC" in by_hour
    assert "00:00: 1.00 MB sent, 3.00 MB saved" in by_hour
    days = [Served((100 - day) * 24 * HOUR + HOUR, 1, 1_000_000, 2_000_000) for day in range(10)]
    by_day = await fragment(saved_over_time([], days + days, now))
    assert by_day.count('<rect class="sent"') == 11
    assert "by day, 1970-03-13 to 1970-04-11 UTC" in by_day
    assert "-2.00 MB" in by_day  # the delta was larger than the full pull: this is displayed
    assert '<a href="/?by=day#saved" aria-current="true">By day</a>' in by_day
    # Weeks begin on Monday: these days are in two of them.
    by_week = await fragment(saved_over_time([], days, now, "week"))
    assert by_week.count('<rect class="sent"') == 1 + 2
    assert "by week, 1969-04-14 to 1970-04-06 UTC" in by_week
    assert '<a href="/?by=week#saved" aria-current="true">By week</a>' in by_week
    assert "by hour" in await fragment(saved_over_time(hours, days, now, "hour"))


@pytest_twisted.ensureDeferred
async def test_a_store_over_its_quota_fits_its_bar() -> None:
    html = await fragment(use_of_store({"deltas": 3_000_000, "layers": 1_000_000}, 1_000_000))
    assert "4.00 MB of 1.00 MB used (400.0 %)" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (999_600, "1.00 MB"),
        (123_456_789, "123 MB"),
        (5e18, "5000 PB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_sizes_are_formatted(value: float, text: str) -> None:
    assert number_format.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64_000, "64 kbit/s"),
        (990_000, "990 kbit/s"),
        (1_800_000, "1.8 Mbit/s"),
        (9_900_000, "9.9 Mbit/s"),
        (12_000_000, "12 Mbit/s"),
        (100_000_000, "100 Mbit/s"),
    ],
)
def test_bit_rates_are_formatted(value: float, text: str) -> None:
    assert number_format.bit_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0123, "0.012 s"),
        (2.345, "2.3 s"),
        (59.7, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (90_000, "1 d 1 h"),
        (-1, "0 s"),
    ],
)
def test_durations_are_formatted(value: float, text: str) -> None:
    assert number_format.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "just now"),
        (59, "just now"),
        (119, "1 min ago"),
        (7300, "2 h ago"),
        (200_000, "2 d ago"),
    ],
)
def test_ages_are_formatted(value: float, text: str) -> None:
    assert number_format.ago(value) == text


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
