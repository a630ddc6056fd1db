"""As a replacement for open-balena-delta: its environment is enough, and its v2 URLs lead to the
old batches, for clients with access.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from obdelta import settings
from obdelta.device.http import Http
from obdelta.settings import openbalena
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.peer_place import ENVIRONMENT, PEER_NAME, REGISTRY, TLD
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack

LEFT = b"left by open-balena-delta" * 100
ROOT = Path(__file__).parents[2]


def test_its_environment_and_volumes_are_enough(tmp_path: Path) -> None:
    """Runs on port 80, with certificate and volumes where the chart puts them
    (tests/support/peer_place.py).
    """
    place = [
        "unshare",
        "--mount",
        "--net",
        "--propagation",
        "private",
        sys.executable,
        "-m",
        "tests.support.peer_place",
    ]
    ran = subprocess.run(
        [*place, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert found["name"].startswith(f"delta.{TLD}/{TARGET_REPOSITORY}:delta-")
    assert (found["is_delta"], found["updated"]) == (True, True)
    assert found["v2_status"] == 300 and found["v2_version"] == 2
    assert found["v2_location"].startswith(f"https://delta.{TLD}/api/v2/delta/download?")
    assert (
        found["peer_without_token"] == 401
        and found["peer_with_token"] == "what open-balena-delta left"
    )
    assert "catalogue.sqlite" in found["state"]


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STATE_DIR", "ENGINE_VOLUME", "RSYNC_VOLUME"):
        monkeypatch.setattr(openbalena, name, str(tmp_path / name))
    return tmp_path


def test_settings_follow_from_its_environment(volumes: Path) -> None:
    configured = settings.read({}, ENVIRONMENT)
    assert configured.listen == ("tcp:80",) and configured.delta_rsync is None
    assert configured.upstream == settings.RegistryUrl(f"https://{REGISTRY}", REGISTRY)
    assert configured.public_url == f"https://delta.{TLD}" and configured.jwt_algorithm == (
        "ES256",
    )
    assert str(configured.auth_key) == f"/certs/private/api.{TLD}.pem" and configured.builder == (
        "native",
    )
    assert REGISTRY in (configured.auth_audience or ()) and configured.state_dir == Path(
        "/var/lib/obdelta"
    )
    rsync, engine, old = volumes / "RSYNC_VOLUME", volumes / "ENGINE_VOLUME", volumes / "STATE_DIR"
    rsync.mkdir()
    configured = settings.read({}, ENVIRONMENT)
    assert (configured.delta_rsync, configured.state_dir) == (rsync, rsync / "obdelta")
    engine.mkdir()
    assert settings.read({}, ENVIRONMENT).state_dir == engine / "obdelta"
    old.mkdir()
    (old / "catalogue.sqlite").touch()
    assert settings.read({}, ENVIRONMENT).state_dir == Path("/var/lib/obdelta")
    assert settings.read({"listen": "tcp:8443"}, ENVIRONMENT).listen == ("tcp:8443",)


@pytest.mark.parametrize("missing", ["DOCKER_HOST", "DOCKER_BUILDKIT"])
def test_without_its_environment_no_setting_follows_from_it(missing: str, volumes: Path) -> None:
    for name in ("RSYNC_VOLUME", "ENGINE_VOLUME"):
        (volumes / name).mkdir()
    environment = {name: value for name, value in ENVIRONMENT.items() if name != missing}
    configured = settings.read({}, environment)
    assert configured.listen == ("tcp:8080",) and configured.delta_rsync is None
    assert configured.state_dir == Path("/var/lib/obdelta")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("peer")
    with running_stack(root / "stack", make_pair(root / "pair")) as running:
        yield running


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[RunningServer]:
    folder = stack.root / "delta-rsync"
    folder.mkdir()
    (folder / PEER_NAME).write_bytes(LEFT)
    (folder / "secret").write_text("not a delta")
    (folder / PEER_NAME.replace("b2", "e5")).symlink_to(folder / "secret")
    (folder / PEER_NAME.replace("b2", "d4")).mkdir()
    with stack.server(delta_rsync=str(folder)) as running:
        yield running


def get(
    server: RunningServer, name: str, token: str | None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    url = f"{server.url}/api/v2/delta/download?delta={quote(name)}"
    own = {"Authorization": f"Bearer {token}"} if token is not None else {}
    with Http(timeout=30).request("GET", url, {**own, **headers}) as answer:
        return answer.status, dict(answer.headers), b"".join(answer.chunks())


def test_its_urls_lead_to_the_batches_that_it_left(server: RunningServer, stack: Stack) -> None:
    token = stack.token(TARGET_REPOSITORY)
    status, headers, content = get(server, PEER_NAME, token)
    assert (status, content, headers["content-length"]) == (200, LEFT, str(len(LEFT)))
    status, headers, content = get(server, PEER_NAME, token, Range="bytes=100-")
    assert (status, content) == (206, LEFT[100:])
    assert headers["content-range"] == f"bytes 100-{len(LEFT) - 1}/{len(LEFT)}"


def test_its_batches_are_not_served_without_access(server: RunningServer, stack: Stack) -> None:
    assert get(server, PEER_NAME, None)[0] == 401
    assert get(server, PEER_NAME, stack.token(BASE_REPOSITORY))[0] == 403
    everything = stack.token("v2/" + "e5" * 16, "v2/" + "d4" * 16, TARGET_REPOSITORY)
    for name, wanted in (
        (PEER_NAME.replace("b2", "e5"), 404),  # a link
        (PEER_NAME.replace("b2", "d4"), 404),  # a directory
        (PEER_NAME.replace("delta-a1", "delta-b1"), 404),
        ("../" + PEER_NAME, 400),
        ("secret", 400),
        (f"{PEER_NAME}/../secret", 400),
        ("../../etc/passwd", 400),
        ("", 400),
        (PEER_NAME + "\n", 400),
        (PEER_NAME.upper(), 400),
    ):
        assert get(server, name, everything)[0] == wanted, name
