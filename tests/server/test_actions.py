"""The list of deltas, and what operators do with them on a real server."""

from __future__ import annotations

import base64
import http.client
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.server.test_v3 import names, update
from tests.support.images import TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until, until_both_forms
from tests.support.server import RunningServer, running_server

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=64 << 10)


@pytest.fixture(scope="module")
def passwords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("passwords") / "operators"
    obdelta = [str(Path(sys.executable).with_name("obdelta")), "password", "alice"]
    done = subprocess.run(
        obdelta, input=f"{PASSWORD}\n", capture_output=True, text=True, check=True
    )
    path.write_text(f"# operators\n{done.stdout}")
    return path


@pytest.fixture
def server(pair: Pair, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}") as running:
        yield running
        assert "Traceback" not in running.log


def call(
    server: RunningServer, method: str, path: str, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    prepared = urllib.request.Request(
        server.operator_url + path,
        b"{}" if method == "POST" else None,
        {"Content-Type": "application/json", **(headers or {})},
        method=method,
    )
    try:
        with urllib.request.urlopen(prepared, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


def listed(server: RunningServer, **query: str) -> list[dict[str, Any]]:
    """Returns every entry that the query selects, from all pages."""
    found: list[dict[str, Any]] = []
    while True:
        status, page, _ = call(server, "GET", f"/api/v1/deltas/list?{urlencode(query)}")
        assert status == 200, page
        found += page["deltas"]
        if page["next"] is None:
            return found
        query["after"] = page["next"]


def act(server: RunningServer, action: str, id_: str) -> tuple[int, dict[str, Any]]:
    return call(server, "POST", f"/api/v1/deltas/{id_}/{action}", server.key_header)[:2]


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def test_a_delta_is_listed_dropped_and_built_again(server: RunningServer, tmp_path: Path) -> None:
    assert listed(server) == []
    assert update(server, tmp_path / "device").is_delta
    until_both_forms(server)
    found = listed(server)
    assert {one["form"] for one in found} == {"gzip", "zstd"}
    assert {one["state"] for one in found} == {"kept"}
    assert sum(one["served"] for one in found) == 1
    (served,) = [one for one in found if one["served"]]
    assert served["saved"] == served["full_bytes"] - served["bytes"] > 0
    assert served["used"] >= served["made"]
    assert served["dest"].startswith(f"{TARGET_REPOSITORY}@sha256:")
    assert call(server, "GET", f"/api/v1/deltas/{served['id']}")[1] == served
    # Pages, orders and filters.
    assert [one["id"] for one in listed(server, limit="1")] == [one["id"] for one in found]
    assert listed(server, sort="served")[0] == served
    assert listed(server, search=f"{TARGET_REPOSITORY[3:12]} {served['id']}") == [served]
    assert listed(server, search="no such word") == listed(server, state="failed") == []
    assert listed(server, fleet=TARGET_REPOSITORY) == found
    assert listed(server, fleet="v2/other") == listed(server, kind="v2") == []
    # Actions that do not fit, then one that does.
    for action in ("retry", "cancel", "forget"):
        assert act(server, action, served["id"])[0] == 409, action
    status, pinned = act(server, "pin", served["id"])
    assert (status, pinned["pinned"], pinned["state"]) == (200, True, "kept")
    assert listed(server, state="pinned") == [pinned]
    for action in ("pin", "drop"):
        assert act(server, action, served["id"])[0] == 409, action
    assert not act(server, "unpin", served["id"])[1]["pinned"]
    assert act(server, "unpin", served["id"])[0] == 409
    for one in found:
        status, gone = act(server, "drop", one["id"])
        assert (status, gone["state"]) == (200, "gone")
    assert listed(server) == []
    assert act(server, "drop", served["id"])[0] == 404
    assert "operator action: user=local action=drop" in server.log
    assert update(server, tmp_path / "again").is_delta
    assert server.log.count("form=gzip outcome=ready") == 2


def test_a_skipped_update_is_retried_or_forgotten(pair: Pair, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(
        state, upstream=f"oci:{pair.root}", max_delta_ratio="0.0001", device_link="metered"
    ) as server:
        assert not update(server, tmp_path / "device").is_delta
        (skipped,) = listed(server, state="skipped")
        assert skipped["reason"].startswith("the delta is too large")
        assert listed(server) == [skipped] and listed(server, state="failed") == []
        builds = server.log.count("outcome=skipped")
        status, again = act(server, "retry", skipped["id"])
        assert (status, again["id"], again["state"] in ("queued", "building")) == (
            200,
            skipped["id"],
            True,
        )
        until("a build was skipped", lambda: server.log.count("outcome=skipped") > builds, 60)
        assert act(server, "drop", skipped["id"])[0] == 409
        assert act(server, "forget", skipped["id"])[1]["state"] == "gone"
        assert listed(server) == []
    # After a change of the setting, a device gets the delta only if the failure is forgotten.
    with running_server(state, upstream=f"oci:{pair.root}") as server:
        assert update(server, tmp_path / "later").is_delta


def test_a_build_is_cancelled_and_its_device_pulls_in_full(tmp_path: Path) -> None:
    large = make_pair(tmp_path / "pair", size=96 << 20)
    with running_server(
        tmp_path / "state", upstream=f"oci:{large.root}", effort="small", max_builds="1"
    ) as server:
        base, target = names(server)
        query = urlencode({"src": base, "dest": target, "wait": "true"})
        device = subprocess.Popen(
            ["curl", "-s", f"{server.url}/api/v3/delta?{query}"], stdout=subprocess.PIPE
        )
        until("it is being built", lambda: listed(server, state="building"), 60)
        (build,) = listed(server)
        status, ended = act(server, "cancel", build["id"])
        assert (status, ended["state"]) == (200, "failed")
        assert ended["reason"] == "an operator cancelled the build"
        assert json.loads(device.communicate(timeout=60)[0]) == {"name": target}
        assert act(server, "cancel", build["id"])[0] == 409
        # The cancelled build is also remembered, and is the reason in the next answer.
        with urllib.request.urlopen(f"{server.url}/api/v3/delta?{query}", timeout=60) as answer:
            assert json.loads(answer.read()) == {"name": target}
        assert server.log.count("outcome=skipped") == 1
        assert act(server, "retry", build["id"])[0] == 200
        until("it is built", lambda: "outcome=ready" in server.log, 60)
        assert "Traceback" not in server.log


def test_without_a_setting_only_the_key_in_state_dir_may_act(server: RunningServer) -> None:
    path = f"/api/v1/deltas/{'0' * 16}/drop"
    status, body, _ = call(server, "POST", path)
    assert status == 403
    assert "operator-passwords" in body["error"]["message"]
    assert call(server, "POST", path, basic("alice", PASSWORD))[0] == 403
    assert call(server, "POST", path, {"X-Forwarded-User": "alice"})[0] == 403
    assert call(server, "POST", path, {"Authorization": f"Bearer {'0' * 64}"})[0] == 401
    assert call(server, "POST", path, server.key_header)[0] == 404
    assert (server.state_dir / "operator-key").stat().st_mode & 0o777 == 0o600
    # A page of another site never acts, whatever headers the browser sends.
    foreign = {**server.key_header, "Origin": "https://evil.example"}
    assert call(server, "POST", path, foreign)[0] == 403


def has_status(server: RunningServer, path: str, status: int) -> bool:
    return call(server, "POST", path, basic("alice", PASSWORD))[0] == status


def test_users_of_the_password_file_may_act(pair: Pair, passwords: Path, tmp_path: Path) -> None:
    path = f"/api/v1/deltas/{'0' * 16}/drop"
    file = tmp_path / "operators"
    file.write_bytes(passwords.read_bytes())
    with running_server(
        tmp_path / "state", upstream=f"oci:{pair.root}", operator_passwords=str(file)
    ) as server:
        status, _, headers = call(server, "POST", path)
        assert (status, headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
        assert call(server, "POST", path, basic("alice", PASSWORD))[0] == 404
        for user, password in (("alice", "wrong"), ("bob", PASSWORD), ("alice", "")):
            assert call(server, "POST", path, basic(user, password))[0] == 401
        assert "operator login refused: peer=127.0.0.1 user='bob'" in server.log
        assert call(server, "POST", path, {"Authorization": "Basic !"})[0] == 401
        # A file that every user of the machine may write says nothing about who may act.
        for mode, status in ((0o666, 401), (0o644, 404)):
            file.chmod(mode)
            file.write_text(file.read_text() + "\n")
            until(f"the status is {status}", partial(has_status, server, path, status), 60)
        assert "every user of this machine may write it" in server.log
        # Reading needs no login, and a user who is removed from the file is locked out at once.
        assert call(server, "GET", "/api/v1/deltas/list")[0] == 200
        file.write_text("# nobody\n")
        until(
            "the password is refused",
            lambda: call(server, "POST", path, basic("alice", PASSWORD))[0] == 401,
            60,
        )
        assert PASSWORD not in server.log


def submit(
    server: RunningServer, path: str, fields: Mapping[str, str], headers: Mapping[str, str]
) -> tuple[int, str | None]:
    """Sends a form as a browser does; returns the status and where it leads."""
    connection = http.client.HTTPConnection(server.operator_url.removeprefix("http://"), timeout=60)
    try:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", path, urlencode(fields), {**kind, **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("location")
    finally:
        connection.close()


def test_only_forms_of_our_own_pages_may_act(pair: Pair, passwords: Path, tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=f"oci:{pair.root}", operator_passwords=str(passwords)
    ) as server:
        assert update(server, tmp_path / "device").is_delta
        with urllib.request.urlopen(f"{server.operator_url}/deltas", timeout=60) as answer:
            page = answer.read().decode()
        (token,) = set(re.findall(r'name="token"[^>]* value="([^"]+)"', page))
        path, login = f"/deltas/{listed(server)[0]['id']}/drop", basic("alice", PASSWORD)
        form = {"token": token, "back": "/deltas?sort=used"}
        assert submit(server, path, {**form, "token": "x"}, login)[0] == 403
        assert submit(server, path, {"back": "/"}, login)[0] == 403
        assert submit(server, path, form, {})[0] == 401
        for back in ("//evil.example/", "https://evil.example/", "/deltas?\n", "/metrics", "/\\e"):
            assert submit(server, path, {**form, "back": back}, login)[0] == 400, back
        for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert submit(server, path, form, {**login, **foreign})[0] == 403
        assert len(listed(server)) == 2
        assert submit(server, path, form, login) == (303, "/deltas?sort=used")
        assert len(listed(server)) == 1
        assert submit(server, path, form, login)[0] == 404


def test_a_trusted_proxy_names_the_user(pair: Pair, tmp_path: Path) -> None:
    path = f"/api/v1/deltas/{'0' * 16}/drop"
    for networks, allowed in (("127.0.0.1", True), ("192.0.2.0/24 unix", False)):
        with running_server(
            tmp_path / f"state {allowed}",
            upstream=f"oci:{pair.root}",
            operator_proxy=f"X-Forwarded-User {networks}",
        ) as server:
            named = call(server, "POST", path, {"X-Forwarded-User": "carol"})[0]
            assert named == (404 if allowed else 403)
            assert call(server, "POST", path, {"X-Forwarded-User": "a b"})[0] == 403
            assert call(server, "POST", path)[0] == 403
            assert call(server, "POST", path, server.key_header)[0] == 404


def test_an_invalid_query_is_refused(server: RunningServer) -> None:
    for query in (
        "sort=oldest",
        "state=gone",
        "limit=0",
        "limit=1001",
        "limit=x",
        "after=x",
        "after=WzEsMl0=",
        "kind=v4",
        "form=xz",
        f"search={'a' * 201}",
        f"search={'a+' * 9}",
        "fleet=.",
    ):
        assert call(server, "GET", f"/api/v1/deltas/list?{query}")[0] == 400, query
