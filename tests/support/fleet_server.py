"""A real server that follows releases in openBalena's API, and what operators ask of it."""

from __future__ import annotations

import base64
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.images import Image, push
from tests.support.commands import OBDELTA
from tests.support.openbalena_api import TOKEN, OpenBalenaApi
from tests.support.processes import until
from tests.support.server import RunningServer
from tests.support.stack import Stack
from tests.support.tokens import pulls

SOURCES = 40
TARGET = f"v2/{'f0' * 16}"
PASSWORD = "correct horse"


def source(number: int) -> str:
    """Returns the repository of one of the releases before."""
    return f"v2/{number:02x}{'e1' * 15}"


def push_image(stack: Stack, image: Image, repository: str) -> None:
    """Pushes an image as openBalena's builder does."""
    authorization = stack.push_authorization(repository)
    push(image, stack.registry.url, repository, "latest", authorization=authorization)


@contextmanager
def serving(
    stack: Stack, api: OpenBalenaApi, folder: Path, **options: Any
) -> Iterator[RunningServer]:
    """A server that polls the API, with a password for operators."""
    passwords = folder / "passwords"
    done = subprocess.run(
        [*OBDELTA, "password", "ci"],
        input=f"{PASSWORD}\n",
        capture_output=True,
        text=True,
        check=True,
    )
    passwords.write_text(done.stdout)
    with stack.server(
        str(folder / "state"),
        environment={"OBDELTA_API_TOKEN": TOKEN},
        api_url=api.url,
        operator_passwords=str(passwords),
        **options,
    ) as server:
        yield server
        assert "Traceback" not in server.log
        assert TOKEN not in server.log


def call(
    server: RunningServer, path: str, login: str | None = None, body: bytes | None = None
) -> tuple[int, Any]:
    """Returns the status and the JSON of an operators' request."""
    headers = {"Content-Type": "application/json"}
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(server.operator_url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def fleet(server: RunningServer) -> dict[str, Any]:
    """Returns the fleet's state."""
    status, found = call(server, "/api/v1/fleet")
    assert status == 200, found
    return dict(found)


def until_unprotected() -> None:
    """Waits for the end of this second: until then deltas stay, also with ``keep_served=0``."""
    second = int(time.time())
    until("the second has passed", lambda: int(time.time()) > second)


def run_prune(server: RunningServer, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, which may act, as it can read state-dir."""
    return subprocess.run(
        [*OBDELTA, "prune", "--config", str(settings_of(server)), *options],
        capture_output=True,
        text=True,
        check=False,
    )


def prune(server: RunningServer, *options: str) -> dict[str, Any]:
    """Returns the command's output."""
    done = run_prune(server, "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == (found["problem"] is None)
    return found


def settings_of(server: RunningServer) -> Path:
    """A settings file that leads commands to the server."""
    file = server.state_dir.parent / "prune.conf"
    file.write_text(f"[obdelta]\nstate-dir = {server.state_dir}\n")
    return file


def in_registry(stack: Stack, repository: str) -> set[str]:
    """The tags of deltas in a repository."""
    token = stack.issuer.token(pulls(repository))
    request = urllib.request.Request(
        f"{stack.registry.url}/v2/{repository}/tags/list",
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return {tag for tag in json.loads(answer.read())["tags"] or [] if tag != "latest"}


def leave(api: OpenBalenaApi, release: int) -> None:
    """Lets all devices leave a release, and remove its images."""
    devices = [row for row in api.tables["device"].values() if row["running"] == release]
    for device in devices:
        device["running"] = None
        for install in api.tables["image_install"].values():
            if install["device"] == device["id"]:
                install["status"] = "deleted"
