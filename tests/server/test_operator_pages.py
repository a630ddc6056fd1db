"""The operators' pages in a browser: a failure comes to the top, and deltas are acted on."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import WebDriverWait

from obdelta.web.operators.pages.live_pages import GATHER_SECONDS
from obdelta.web.operators.passwords import make_line
from tests.server.test_actions import act, listed
from tests.server.test_v3 import names, update
from tests.support.axe import violations
from tests.support.browser import MEASURE, browser, faults, text_of
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until, until_both_forms
from tests.support.registry import running_registry
from tests.support.server import RunningServer, free_port, running_server
from tests.support.tokens import make_certificate, make_key, private_pem

NEVER = 1e9
"""Seconds: a change that is displayed sooner came with an event, not with the regular refresh."""
REFRESH = "obdelta.web.operators.pages.live_pages.REFRESH_SECONDS"
CROWDED = """
const line = parseFloat(getComputedStyle(document.body).lineHeight);
const right = (one) => one.getBoundingClientRect().right;
const buttons = [...document.querySelectorAll("button")];
const content = [...document.querySelectorAll("section :not(svg *, .hidden, thead *)")];
return [
    ...buttons.filter((one) => one.offsetHeight > 2 * line),
    ...content.filter((one) => right(one) > right(one.closest("section"))),
].map((one) => one.outerHTML);
"""
"""Buttons of more than one line, and content that extends beyond its card."""
PAGES = ("/", "/deltas", "/deltas?state=skipped", "/fleets", "/help")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "pair", size=64 << 10)


@contextmanager
def acting_server(
    pair: Pair,
    tmp_path: Path,
    upstream: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    passwords = tmp_path / "operators"
    passwords.write_text(make_line("alice", "secret"))
    with running_server(
        tmp_path / "state",
        upstream=upstream or f"oci:{pair.root}",
        environment=environment,
        operator_passwords=str(passwords),
        constants={REFRESH: NEVER},
    ) as server:
        yield server
        assert "Traceback" not in server.log


def log_in(page: Chrome) -> None:
    """Returns the headers that a browser sends after its user has logged in."""
    login = base64.b64encode(b"alice:secret").decode()
    page.execute_cdp_cmd("Network.enable", {})
    page.execute_cdp_cmd(
        "Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {login}"}}
    )


def wait(page: Chrome, condition: str) -> None:
    WebDriverWait(page, 60).until(lambda _: page.execute_script(f"return {condition}"))


def icon(page: Chrome) -> str:
    return str(page.execute_script("return document.querySelector('link[rel=icon]').href"))


def damaged(pair: Pair) -> list[tuple[Path, bytes]]:
    """Damages every blob of more than 4 KiB; returns the original contents."""
    blobs = [path for path in pair.root.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    whole = [(path, path.read_bytes()) for path in blobs]
    for path, data in whole:
        path.write_bytes(bytes(len(data)))
    return whole


def test_a_failed_build_comes_to_the_top_and_is_retried_there(pair: Pair, tmp_path: Path) -> None:
    """On a phone, in dark mode, by keys alone. Events of builds update the page: it is not
    reloaded.
    """
    assert GATHER_SECONDS < 1  # the longest delay before an event is sent
    whole = damaged(pair)
    with (
        acting_server(pair, tmp_path) as server,
        browser(tmp_path / "profile", width=390, height=844, dark=True) as page,
    ):
        log_in(page)
        page.get(f"{server.operator_url}/")
        assert page.title == "obdelta" and icon(page).endswith("/icon.svg")
        assert not page.find_element(By.ID, "attention").is_displayed()
        base, target = names(server)
        query = urlencode({"src": base, "dest": target, "wait": "true"})
        device = subprocess.Popen(["curl", "-s", f"{server.url}/api/v3/delta?{query}"])
        wait(page, "!document.getElementById('attention').hidden")
        assert page.title == "⚠ 1 problem · obdelta" and icon(page).endswith("/alert.svg")
        assert "Check whether the registry can be reached" in text_of(page, "attention")
        top = "document.getElementById('{}').getBoundingClientRect().top"
        assert page.execute_script(
            f"return {top.format('attention')} < {top.format('builds')}"
            f" && {top.format('builds')} < {top.format('summary')}"
            f" && {top.format('attention')} < window.innerHeight / 2"
        )
        assert page.execute_script(CROWDED) == []
        assert violations(page) == []
        # The remedy: the images are pushed again, and the button builds the delta.
        for path, data in whole:
            path.write_bytes(data)
        press(page, lambda: str(focused(page, "id")).startswith("retry-"))
        page.switch_to.active_element.send_keys(Keys.ENTER)
        until("it is built", lambda: "outcome=ready" in server.log, 60)
        wait(page, f"document.getElementById('deltas').innerText.includes('{TARGET_REPOSITORY}')")
        assert not page.find_element(By.ID, "attention").is_displayed()
        assert page.title == "obdelta" and icon(page).endswith("/icon.svg")
        device.kill()
        device.wait()
        assert "operator action: user=alice action=retry" in server.log
        assert faults(page) == []


def test_an_outage_of_the_registry_comes_to_the_top_of_every_open_page(
    pair: Pair, tmp_path: Path
) -> None:
    """Checks for problems find its begin and its end: the regular refresh never comes."""
    port = free_port()
    with (
        ExitStack() as running,
        acting_server(pair, tmp_path, upstream=f"http://127.0.0.1:{port}") as server,
        browser(tmp_path / "profile") as page,
        browser(tmp_path / "profile of another") as other,
    ):
        running.enter_context(running_registry(tmp_path / "registry", port=port))
        for each in (page, other):
            each.get(f"{server.operator_url}/")
            wait(each, "document.getElementById('attention').hidden")
        running.close()
        for each in (page, other):
            wait(each, "!document.getElementById('attention').hidden")
            assert "Not ready: upstream: " in text_of(each, "attention")
            assert "Check whether the registry runs" in text_of(each, "attention")
            assert text_of(each, "state").startswith("Not ready. upstream: ")
            assert each.title == "⚠ 1 problem · obdelta" and icon(each).endswith("/alert.svg")
            assert violations(each) == []
        running.enter_context(running_registry(tmp_path / "registry", port=port))
        for each in (page, other):
            wait(each, "document.getElementById('attention').hidden")
            assert text_of(each, "state") == "Ready"
            assert each.title == "obdelta" and icon(each).endswith("/icon.svg")
            assert faults(each) == []


def test_a_renewed_certificate_that_is_unusable_comes_to_the_top(
    pair: Pair, tmp_path: Path
) -> None:
    """No device has to connect before it is found."""
    file, key = tmp_path / "delta.pem", make_key("ES256")
    good = make_certificate(key, "localhost") + private_pem(key)
    file.write_bytes(good)
    with (
        acting_server(pair, tmp_path, environment={"OBDELTA_TLS_CERTIFICATE": str(file)}) as server,
        browser(tmp_path / "profile") as page,
    ):
        page.get(f"{server.operator_url}/")
        assert page.title == "obdelta"
        file.write_bytes(good[:200])
        wait(page, "!document.getElementById('attention').hidden")
        assert f"The new {file} cannot be used: it holds no PEM" in text_of(page, "attention")
        assert page.title == "⚠ 1 problem · obdelta" and icon(page).endswith("/alert.svg")
        file.write_bytes(make_certificate(key, "localhost", days=-1) + private_pem(key))
        wait(page, "document.getElementById('attention').innerText.includes('expires already')")
        assert page.title == "⚠ 1 problem · obdelta"
        file.write_bytes(good)
        wait(page, "document.getElementById('attention').hidden")
        assert page.title == "obdelta" and icon(page).endswith("/icon.svg")


def test_the_links_of_the_plot_choose_its_step(pair: Pair, tmp_path: Path) -> None:
    """By mouse and by keys: the address, the chosen link and the drawn range change."""
    with (
        acting_server(pair, tmp_path) as server,
        browser(tmp_path / "profile") as page,
    ):
        assert update(server, tmp_path / "device").is_delta
        until_both_forms(server)
        until("the update is counted", lambda: any(one["served"] for one in listed(server)))
        page.get(f"{server.operator_url}/")
        assert chosen(page) == "By hour"
        ranges = {range_of(page)}
        for step in ("week", "day", "hour"):
            page.find_element(By.LINK_TEXT, f"By {step}").click()
            ranges.add(range_after(page, step))
        assert len(ranges) == 3
        for step in ("day", "week", "hour"):
            press(page, lambda step=step: page.switch_to.active_element.text == f"By {step}")
            page.switch_to.active_element.send_keys(Keys.ENTER)
            assert range_after(page, step) in ranges
        # An event keeps the step that the address names.
        page.get(f"{server.operator_url}/?by=week#saved")
        drop = listed(server)[0]["id"]
        assert act(server, "drop", drop)[0] == 200
        assert update(server, tmp_path / "again").is_delta
        wait(page, "document.getElementById('saved').innerText.includes('by week')")
        assert chosen(page) == "By week"
        assert faults(page) == []


def chosen(page: Chrome) -> str:
    (link,) = page.find_elements(By.CSS_SELECTOR, "#saved nav a[aria-current]")
    return link.text


def range_of(page: Chrome) -> str:
    """Returns the line below the plot that names its step and its range."""
    return page.find_element(By.CSS_SELECTOR, "#saved figcaption span:last-child").text


def range_after(page: Chrome, step: str) -> str:
    """Returns the plot's range after a link was followed."""
    wait(page, f"location.search === '?by={step}' && location.hash === '#saved'")
    assert chosen(page) == f"By {step}"
    drawn = range_of(page)
    assert drawn.startswith(f"by {step}, ")
    top = "document.getElementById('saved').getBoundingClientRect()"
    assert page.execute_script(f"return {top}.top < window.innerHeight && {top}.bottom > 0")
    return drawn


def test_a_delta_is_found_by_keyboard_and_dropped(pair: Pair, tmp_path: Path) -> None:
    with (
        acting_server(pair, tmp_path) as server,
        browser(tmp_path / "profile") as page,
    ):
        assert update(server, tmp_path / "device").is_delta
        until_both_forms(server)
        log_in(page)
        page.get(f"{server.operator_url}/")
        # Only keys are used: to the box, a search, then to the first button.
        press(page, lambda: focused(page, "name") == "search")
        page.switch_to.active_element.send_keys(TARGET_REPOSITORY[:20], Keys.ENTER)
        wait(page, "location.pathname === '/deltas'")
        assert len(page.find_elements(By.CSS_SELECTOR, "#found tbody tr")) == 2
        for label, sort in (("Delta", "size"), ("Served", "served"), ("Last served", "used")):
            press(page, lambda label=label: page.switch_to.active_element.text == label)
            page.switch_to.active_element.send_keys(Keys.ENTER)
            wait(page, f"location.search.includes('sort={sort}')")
            assert "search=" in page.current_url
            (ordered,) = page.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
            assert ordered.text == label
        press(page, lambda: str(focused(page, "id")).startswith("drop-"))
        id_ = str(focused(page, "id")).removeprefix("drop-")
        page.switch_to.active_element.send_keys(Keys.ENTER)
        page.switch_to.alert.accept()
        until("it is dropped", lambda: id_ not in [one["id"] for one in listed(server)], 60)
        wait(page, "document.querySelectorAll('#found tbody tr').length === 1")
        assert "sort=used" in page.current_url
        assert faults(page) == []


def press(page: Chrome, reached: object) -> None:
    """Presses Tab until something is reached."""
    for _ in range(60):
        if reached():  # type: ignore[operator] # a function
            return
        page.switch_to.active_element.send_keys(Keys.TAB)
    raise AssertionError("no key leads there")


def focused(page: Chrome, attribute: str) -> object:
    return page.execute_script(f"return document.activeElement?.getAttribute('{attribute}')")


def test_every_page_is_accessible_on_screens_of_all_kinds(pair: Pair, tmp_path: Path) -> None:
    with acting_server(pair, tmp_path) as server:
        assert update(server, tmp_path / "device").is_delta
        until_both_forms(server)
        base, target = names(server)
        (first, *_) = listed(server, state="kept")
        assert first["dest"].startswith(TARGET_REPOSITORY), (base, target)
        for number, (width, dark) in enumerate(((1200, False), (1200, True), (390, True))):
            with browser(tmp_path / f"profile {number}", width=width, dark=dark) as page:
                page.get(f"{server.operator_url}/")
                link = page.execute_script("return document.querySelector('#deltas tbody a').href")
                for address in (*(f"{server.operator_url}{path}" for path in PAGES), str(link)):
                    page.get(address)
                    for narrower in (1100, 1000, 800):
                        resize(page, min(width, narrower))
                        assert page.execute_script(CROWDED) == [], (address, narrower)
                    resize(page, width)
                    page_width, _, right = page.execute_script(MEASURE)
                    assert max(page_width, right) <= width, address
                    assert page.execute_script(CROWDED) == [], (address, width)
                    assert violations(page) == [], (address, width, dark)
                assert faults(page) == []
        without_scripts(server, tmp_path)


def resize(page: Chrome, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )


def without_scripts(server: RunningServer, tmp_path: Path) -> None:
    with browser(tmp_path / "profile without scripts", scripts=False) as page:
        log_in(page)
        page.get(f"{server.operator_url}/deltas?form=gzip")
        assert len(page.find_elements(By.CSS_SELECTOR, "#found tbody tr")) == 1
        (entry,) = listed(server, form="gzip")

        def press_button(action: str) -> str:
            """Presses a button; returns the text of the page afterwards."""
            button = page.find_element(By.ID, f"{action}-{entry['id']}")
            button.click()
            # A click does not wait for the page that it leads to.
            WebDriverWait(page, 30).until(staleness_of(button))
            return page.find_element(By.ID, "found").text

        assert "kept, pinned" in press_button("pin")
        assert [one["id"] for one in listed(server, state="pinned")] == [entry["id"]]
        # A pinned delta has to be unpinned first.
        assert page.find_elements(By.ID, f"drop-{entry['id']}") == []
        assert "pinned" not in press_button("unpin")
        assert "Nothing matches." in press_button("drop")
        assert [one["form"] for one in listed(server)] == ["zstd"]
