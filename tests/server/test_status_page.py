"""The status page in a real browser during a real build."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.server.test_v3 import update
from tests.support.browser import MEASURE, browser, faults, text_of, wait_for
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server

WATCH = """
window.seen = [];
new MutationObserver(() => {
    const text = document.getElementById("builds").innerText;
    if (text !== window.seen.at(-1)) window.seen.push(text);
}).observe(document.querySelector("main"), {childList: true, subtree: true});
window.unloaded = false;
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=96 << 20)


def open_newest(page: Chrome) -> None:
    page.execute_script("document.querySelector('#deltas tbody a').click()")
    wait_for(page, lambda _: "/pairs/v3/" in page.current_url and text_of(page, "files") != "")


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
