"""v2 end to end: the real server as an ordinary user runs it, Debian's registry, and rsync as the
device's reader.
"""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.images import push
from obdelta.rootfs.compare import differences
from obdelta.rootfs.unpack import unpack
from obdelta.rsync import batch
from obdelta.rsync.proof import copy_for_proof
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until
from tests.support.registry import running_registry
from tests.support.server import RunningServer, running_server

SUPERVISOR = "Supervisor/14.9.4 (Linux; balenaOS 2.115.1)"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=2 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        push(pair.base, running.url, BASE_REPOSITORY)
        push(pair.target, running.url, TARGET_REPOSITORY)
        yield running.url


@pytest.fixture(scope="module")
def server(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server") / "state", upstream=registry) as running:
        yield running


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(
        url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=90) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def located(server: RunningServer, user_agent: str = SUPERVISOR, extra: str = "&wait=true") -> str:
    query = f"src={server.host}/{BASE_REPOSITORY}&dest={server.host}/{TARGET_REPOSITORY}{extra}"
    status, headers, body = get(f"{server.url}/api/v2/delta?{query}", User_Agent=user_agent)
    assert 300 <= status < 400, body
    assert headers["location"].startswith(server.url)
    return headers["location"]


def trees(pair: Pair, tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for name, image in (("base", pair.base), ("target", pair.target)):
        layers = []
        for number, layer in enumerate(image.layers):
            path = tmp_path / f"{name}-{number}.tar"
            layer.write_tar(path)
            layers.append((layer.diff_id, path))
        unpack(layers, tmp_path / name)
        made.append(tmp_path / name / "root")
    return made[0], made[1]


def test_a_device_ends_with_the_targets_tree(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    url = located(server)
    status, headers, body = get(url)
    assert status == 200
    assert headers["content-length"] == str(len(body))
    assert headers["accept-ranges"] == "bytes"
    header, _, stream = body.partition(b"\0")
    assert json.loads(header)["version"] == 2
    base, target = trees(pair, tmp_path)
    copy_for_proof(base, target, tmp_path / "device")
    subprocess.run(
        [
            "rsync",
            "--archive",
            "--delete",
            "--fake-super",
            "--read-batch=-",
            f"{tmp_path / 'device'}/",
        ],
        input=stream,
        check=True,
        capture_output=True,
    )
    assert list(differences(tmp_path / "device", target)) == []


def test_a_finished_batch_is_served_in_ranges(server: RunningServer) -> None:
    url = located(server)
    _, headers, whole = get(url)
    etag = headers["etag"]
    status, headers, part = get(url, Range="bytes=100-")
    assert (status, part) == (206, whole[100:])
    assert headers["content-range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"
    assert get(url, Range="bytes=5-9", If_Range=etag)[2] == whole[5:10]
    assert get(url, Range="bytes=5-9", If_Range='"other"')[::2] == (200, whole)
    assert get(url, Range=f"bytes={len(whole)}-")[0] == 416
    status, headers, body = get(url, method="HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(whole)))


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("expires=", "expires=9"),
        lambda url: url[:-1] + ("0" if url[-1] != "0" else "1"),
        lambda url: url.replace("base=", "target=", 1),
        lambda url: url + "&x=1",
        lambda url: url.partition("?")[0],
        lambda url: url.partition("?")[0] + "?delta=../../../etc/passwd",
        lambda url: url.replace("target=", "target=..%2f..%2f", 1),
    ],
)
def test_a_url_with_a_foreign_signature_is_refused(server: RunningServer, change: Any) -> None:
    status, _, body = get(change(located(server)))
    assert status == 403
    assert body.count(b"\n") == 1


def test_a_url_expires(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, v2_url_lifetime="0") as server:
        url = located(server)
        while get(url)[0] != 403:  # until the second in which it was signed is over
            pass
        assert b"expired" in get(url)[2]


def full_pull(server: RunningServer, url: str) -> None:
    """The answer is a batch that makes rsync exit with 23, which docker-delta reports as
    OutOfSync.
    """
    status, headers, body = get(url)
    assert status == 200
    assert int(headers["content-length"]) == len(body) > 0
    _, _, stream = body.partition(b"\0")
    place = server.state_dir.parent / "device-without-delta"
    place.mkdir(exist_ok=True)
    ran = subprocess.run(
        ["rsync", "--archive", "--delete", "--read-batch=-", f"{place}/"], input=stream, check=False
    )
    assert ran.returncode == 23


@pytest.mark.parametrize("version", ["16.2.33", "16.10.1", "17.0.0", "v19.1.2"])
def test_supervisors_that_close_the_stream_late_get_a_delay(
    server: RunningServer, version: str
) -> None:
    """The batch is the same, with one more record before its end; ranges count it."""
    plain = get(located(server))[2]
    url = located(server, f"Supervisor/{version} (Linux)")
    _, headers, body = get(url)
    assert headers["content-length"] == str(len(body))
    extra = len(body) - len(plain)
    (at,) = [
        at
        for at in range(len(plain) + 1)
        if body[:at] == plain[:at] and body[at + extra :] == plain[at:]
    ][:1]
    assert 0 < len(plain) - at < 40 and 140_000 < extra < 150_000
    for start, stop in ((at - 5, at + 5), (at + 100, at + 70_000), (at + extra - 3, len(body))):
        assert get(url, Range=f"bytes={start}-{stop - 1}")[2] == body[start:stop]


def test_an_older_supervisor_gets_the_batch_without_a_delay(server: RunningServer) -> None:
    assert get(located(server, "Supervisor/16.2.32 (Linux)"))[2] == get(located(server))[2]


def test_supervisors_that_close_the_stream_late_get_a_delay_where_there_is_no_delta(
    server: RunningServer,
) -> None:
    query = f"src={server.host}/v2/{'0' * 32}&dest={server.host}/{TARGET_REPOSITORY}"
    _, headers, _ = get(
        f"{server.url}/api/v2/delta?{query}", User_Agent="Supervisor/16.2.33 (Linux)"
    )
    assert get(headers["location"])[2] == batch.delayed_out_of_sync()


def test_a_base_that_is_gone_leads_to_a_full_pull(server: RunningServer) -> None:
    query = f"src={server.host}/v2/{'0' * 32}&dest={server.host}/{TARGET_REPOSITORY}"
    status, headers, _ = get(f"{server.url}/api/v2/delta?{query}", User_Agent=SUPERVISOR)
    assert status == 300
    full_pull(server, headers["location"])


def test_fleets_that_must_never_pull_in_full_get_an_error(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry, v2_full_pull="no") as server:
        query = f"src={server.host}/v2/{'0' * 32}&dest={server.host}/{TARGET_REPOSITORY}"
        status, headers, body = get(f"{server.url}/api/v2/delta?{query}", User_Agent=SUPERVISOR)
        assert status == 400
        assert "location" not in headers
        assert b"gone" in body


def test_the_same_pair_gives_the_same_batch(registry: str, tmp_path: Path) -> None:
    bodies = []
    for number in range(2):
        with running_server(tmp_path / f"state{number}", upstream=registry) as server:
            bodies.append(get(located(server))[2])
    assert bodies[0] == bodies[1]


def test_streaming_clients_share_one_rsync(registry: str, tmp_path: Path) -> None:
    """Two clients that are no supervisors join one build at different moments; both get what a
    later client gets.
    """
    with running_server(tmp_path / "state", upstream=registry) as server:
        url = located(server, "curl/8")
        first = get(url)
        second = get(located(server, "curl/8"))
        finished = get(located(server))
        assert first[2] == second[2] == finished[2]
        assert finished[1]["content-length"] == str(len(finished[2]))
        assert server.log.count("outcome=ready") == 1


NO_RSYNC = {
    "missing": None,
    "not executable": ("", 0o644),
    "killed": ("#!/bin/sh\nkill -9 $$\n", 0o755),
    "broken": ("#!/bin/sh\nexit 127\n", 0o755),
}


@pytest.mark.parametrize("kind", NO_RSYNC)
def test_without_rsync_the_first_answer_is_a_full_pull(
    registry: str, tmp_path: Path, kind: str
) -> None:
    """The problem is reported at the start, and to operators; v3 works. After rsync is installed,
    no failure is remembered.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    if (script := NO_RSYNC[kind]) is not None:
        (programs / "rsync").write_text(script[0])
        (programs / "rsync").chmod(script[1])
    with running_server(
        tmp_path / "state", upstream=registry, environment={"PATH": str(programs)}, log_level="info"
    ) as server:
        message = next(
            line for line in server.log.splitlines() if "v2 is answered with full pulls" in line
        )
        assert "rsync" in message
        ready = get(f"{server.operator_url}/readyz")
        assert (ready[0], b"v2 is answered with full pulls" in ready[2]) == (200, True)
        assert located(server, extra="").endswith("?full-pull=yes")
        assert "outcome=ready" not in server.log and "build.retried" not in server.log
        assert "retried once" not in server.log and "Traceback" not in server.log
        (programs / "rsync").unlink(missing_ok=True)
        (programs / "rsync").symlink_to("/usr/bin/rsync")
        until("v2 gets deltas", lambda: "full-pull" not in located(server), 60)


def test_operators_see_devices_that_need_a_delay(server: RunningServer) -> None:
    get(located(server, "Supervisor/16.3.0 (Linux)"))
    words = b"set BALENA_SUPERVISOR_DELTA_VERSION=3"
    assert words in get(f"{server.operator_url}/readyz")[2]
    assert words in get(f"{server.operator_url}/")[2]
    (note,) = json.loads(get(f"{server.operator_url}/api/v1/status")[2])["notes"]
    assert note.startswith("1 device requests v2 updates")
    assert b'area="v2",event="delayed"' in get(f"{server.operator_url}/metrics")[2].replace(
        b", ", b","
    )
