"""``docker_config`` compared with a real engine's output for the same image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from bench.images import Image, make_image
from obdelta.errors import ManifestInvalid
from obdelta.oci import parse_config
from obdelta.rsync.docker_config import docker_config
from tests.support import rootfs
from tests.support.dockerd import RunningDockerd, dockerd

__all__ = ["dockerd"]

FULL = {
    "Hostname": "h",
    "Domainname": "d",
    "User": "1000:1000",
    "AttachStdin": True,
    "AttachStdout": True,
    "AttachStderr": True,
    "ExposedPorts": {"80/tcp": {}, "53/udp": {"ignored": 1}},
    "Tty": True,
    "OpenStdin": True,
    "StdinOnce": True,
    "Env": ["PATH=/bin", "EMPTY=", "ÜNI=<code> & ☃"],
    "Cmd": ["sh", "-c", "x"],
    "Healthcheck": {"Test": ["CMD", "x"], "Interval": 1_000_000_000, "Timeout": 0, "Retries": 3},
    "ArgsEscaped": True,
    "Image": "sha256:0",
    "Volumes": {"/data": {}},
    "WorkingDir": "/w",
    "Entrypoint": ["/entry"],
    "NetworkDisabled": True,
    "MacAddress": "02:42:ac:11:00:02",
    "OnBuild": ["RUN x"],
    "Labels": {"io.balena.features": "1", "": "empty"},
    "StopSignal": "SIGINT",
    "StopTimeout": 0,
    "Shell": ["/bin/bash"],
}
GOOD: dict[str, Any] = {
    "full": FULL,
    "empty": {},
    "none": None,
    "nulls": dict.fromkeys(FULL),
    "empties": {
        "ExposedPorts": {},
        "Env": [],
        "Cmd": [],
        "Healthcheck": {},
        "Volumes": {},
        "Entrypoint": [],
        "OnBuild": [],
        "Labels": {},
        "Shell": [],
        "ArgsEscaped": False,
        "StopSignal": "",
    },
    "texts": {"Cmd": "one text", "Entrypoint": "", "Shell": "sh"},
    "cases": {
        "cmd": ["a"],
        "ENV": ["b=c"],
        "healthcheck": {"test": ["NONE"], "interval": 5},
        "workingdir": "/x",
    },
    "unknown": {"Cmd": ["a"], "Unknown": {"x": 1}, "Memory": 5},
    "null inside": {"Env": ["a=b", None], "Labels": {"a": None}, "Volumes": {"/v": None}},
}
BAD: dict[str, Any] = {
    "list for text": {"User": ["x"]},
    "number for text": {"WorkingDir": 5},
    "text for list": {"Env": "A=B"},
    "text for flag": {"Tty": "yes"},
    "list for object": {"Labels": []},
    "number in list": {"Cmd": [1]},
    "number in labels": {"Labels": {"a": 1}},
    "fraction": {"StopTimeout": 1.5},
    "flag for number": {"StopTimeout": True},
    "not an object": [],
    "text for health": {"Healthcheck": "NONE"},
    "list in volumes": {"Volumes": {"/v": []}},
}


def image(config: Any, root: Path) -> Image:
    return make_image(
        [rootfs.layer([rootfs.file("x")], root / "blobs")],
        root / "layout",
        config={"config": config},
    )


@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_the_config_is_as_the_engine_prints_it(
    dockerd: RunningDockerd, tmp_path: Path, config: Any
) -> None:
    made = image(config, tmp_path)
    dockerd.load(made)
    assert docker_config(parse_config(made.config)) == dockerd.inspect(str(made.image_id))["Config"]


def test_an_image_without_the_field(dockerd: RunningDockerd, tmp_path: Path) -> None:
    value = json.loads(image(None, tmp_path).config)
    del value["config"]
    assert docker_config(parse_config(json.dumps(value).encode())) is None


@pytest.mark.parametrize("config", BAD.values(), ids=BAD)
def test_configs_that_the_engine_does_not_load_are_refused(
    dockerd: RunningDockerd, tmp_path: Path, config: Any
) -> None:
    made = image(config, tmp_path)
    with pytest.raises(docker.errors.ImageLoadError):
        dockerd.load(made)
    with pytest.raises(ManifestInvalid):
        docker_config(parse_config(made.config))
