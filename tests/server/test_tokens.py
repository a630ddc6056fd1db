"""Tokens and the proxy, all real: haproxy (SNI pass-through, send-proxy-v2), the server with TLS
and token authentication, and docker-registry configured for the same tokens.

The clients are the device of ``obdelta check``, skopeo and a Docker engine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import docker
import pytest

from bench.images import Image
from obdelta.device.pull import Engine
from obdelta.device.update import Device
from obdelta.oci import Reference
from tests.support.behind_haproxy import Device as TlsDevice
from tests.support.dockerd import RunningDockerd
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.registry import BUILDER_TOKEN
from tests.support.token_front import (
    BIG_REPOSITORY,
    DEVICE,
    NAME,
    REALM,
    Front,
    RecordingIssuer,
    big,
    front,
    issuer,
    pair,
    registry,
    token,
)
from tests.support.tokens import AUDIENCE, private_pem, pulls

__all__ = ["big", "front", "issuer", "pair", "registry", "token"]


def test_a_device_updates_and_the_log_has_its_address(
    front: Front, token: str, pair: Pair, tmp_path: Path
) -> None:
    client = front.http()
    device = Device(client, Engine(client, token, registry=front.url), front.url, token)
    base, target = f"{front.host}/{BASE_REPOSITORY}", f"{front.host}/{TARGET_REPOSITORY}"
    done = device.update(device.load_base(Reference.parse(base), tmp_path), base, target, tmp_path)
    assert done.is_delta and done.image_id == pair.target.image_id
    lines = [
        line
        for line in front.server.log.splitlines()
        if "/api/v3/delta" in line or f"/v2/{done.name}" in line
    ]
    assert lines and all(f"peer={DEVICE} " in line for line in lines)


def test_skopeo_copies_images_and_deltas(
    front: Front, token: str, pair: Pair, tmp_path: Path
) -> None:
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    (certificates / "ca.crt").write_bytes(front.keys.ca.read_bytes())
    for name in (f"{front.host}/{BASE_REPOSITORY}:latest", str(front.delta(token))):
        options = ["--src-cert-dir", str(certificates), "--src-registry-token", token]
        copy = tmp_path / name.rpartition(":")[2]
        ran = subprocess.run(
            ["skopeo", "copy", *options, f"docker://{name}", f"dir:{copy}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr.replace(token, "…")
        assert (copy / "manifest.json").exists()
    assert (tmp_path / "latest" / "manifest.json").read_bytes() == pair.base.manifest


def test_a_docker_engine_pulls(
    front: Front, token: str, pair: Pair, dockerd: RunningDockerd
) -> None:
    """Uses a registry token, as balena's supervisor gives it to its engine."""
    for name, image_id in (
        (f"{front.host}/{BASE_REPOSITORY}:latest", pair.base.image_id),
        (f"{front.host}/{TARGET_REPOSITORY}:latest", pair.target.image_id),
    ):
        repository, _, tag = name.rpartition(":")
        for line in dockerd.client.api.pull(
            repository, tag, auth_config={"registrytoken": token}, stream=True, decode=True
        ):
            assert "error" not in line, line
        assert dockerd.inspect(name)["Id"] == str(image_id)
        dockerd.command("rmi", name)


def test_a_docker_engine_without_access_gets_a_clear_error(
    front: Front, dockerd: RunningDockerd
) -> None:
    only = front.issuer.api_token(BASE_REPOSITORY)
    with pytest.raises(docker.errors.APIError) as error:
        dockerd.client.api.pull(
            f"{front.host}/{TARGET_REPOSITORY}", "latest", auth_config={"registrytoken": only}
        )
    assert f"the token does not allow pull on {TARGET_REPOSITORY}" in str(error.value)


def faces(front: Front, token: str, pair: Pair) -> dict[str, str]:
    """Returns the paths to a finished delta and to its two images."""
    delta = front.delta(token)
    answer = front.get(f"/v2/{delta.repository}/manifests/{delta.tag}", token)
    digest = answer.headers["docker-content-digest"]
    largest = max(json.loads(answer.body)["layers"], key=lambda layer: int(layer["size"]))
    return {
        "ping": "/v2/",
        "api": front.question(),
        "api of v2": front.question(version=2),
        "tag": f"/v2/{delta.repository}/manifests/{delta.tag}",
        "tag of the base": (
            f"/v2/{TARGET_REPOSITORY}/manifests/delta-{BASE_REPOSITORY.removeprefix('v2/')}"
        ),
        "digest": f"/v2/{delta.repository}/manifests/{digest}",
        "delta blob": f"/v2/{delta.repository}/blobs/{largest['digest']}",
        "base": f"/v2/{BASE_REPOSITORY}/manifests/latest",
        "base blob": f"/v2/{BASE_REPOSITORY}/blobs/{pair.base.layers[1].digest}",
        "target": f"/v2/{TARGET_REPOSITORY}/manifests/latest",
    }


BASE_FACES, TARGET_FACES = {"base", "base blob"}, {"target", "delta blob"}
BOTH = {"api", "api of v2", "tag", "tag of the base", "digest"}


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        (pulls(BASE_REPOSITORY, TARGET_REPOSITORY), BOTH | BASE_FACES | TARGET_FACES),
        (pulls(BASE_REPOSITORY), BASE_FACES),
        (pulls(TARGET_REPOSITORY), TARGET_FACES),
        (pulls(), set()),
        (pulls(BIG_REPOSITORY), set()),
        (pulls("v2", BASE_REPOSITORY[:-1], TARGET_REPOSITORY + "/x"), set()),
        (
            [{**entry, "actions": ["push"]} for entry in pulls(BASE_REPOSITORY, TARGET_REPOSITORY)],
            set(),
        ),
        ([{**entry, "actions": []} for entry in pulls(BASE_REPOSITORY, TARGET_REPOSITORY)], set()),
        (
            [{**entry, "type": "registry"} for entry in pulls(BASE_REPOSITORY, TARGET_REPOSITORY)],
            set(),
        ),
    ],
    ids=["both", "base", "target", "none", "another", "like", "push", "no actions", "other type"],
)
def test_a_finished_delta_is_refused_like_a_new_one(
    front: Front, token: str, pair: Pair, access: list[dict[str, Any]], allowed: set[str]
) -> None:
    shown = faces(front, token, pair)
    less = front.issuer.api_token(access=access)
    for name, path in shown.items():
        expected = 200 if name == "ping" or name in allowed else 403
        if name == "api of v2" and expected == 200:
            expected = 300
        for method, agent in (
            ("GET", "balena-engine/20.10.43"),
            ("HEAD", ""),
            ("GET", "Supervisor/17.0.0"),
        ):
            # Without wait=true: with it, a token that grants nothing is a builder's.
            answer = front.get(
                path.replace("&wait=true", ""), less, {"User-Agent": agent}, method=method
            )
            assert answer.status == expected, (name, method, answer.body)
            if expected == 403 and method == "GET" and path.startswith("/v2/"):
                assert json.loads(answer.body)["errors"][0]["code"] == "DENIED"


def test_without_a_valid_token_each_endpoint_answers_with_its_challenge(
    front: Front, token: str, pair: Pair
) -> None:
    other = RecordingIssuer()
    hour = 3600
    invalid = {
        "expired": front.issuer.token(
            pulls(BASE_REPOSITORY, TARGET_REPOSITORY), now=time.time() - 10 * hour
        ),
        "another key": other.api_token(BASE_REPOSITORY, TARGET_REPOSITORY),
        "altered": token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"),
        "garbage": "a.b.c",
    }
    front.issuer.signed += [*other.signed, invalid["altered"]]
    both = [BASE_REPOSITORY, TARGET_REPOSITORY]
    for name, path in faces(front, token, pair).items():
        needs = (
            []
            if name == "ping"
            else (
                both
                if name.startswith("api")
                else [BASE_REPOSITORY if name in BASE_FACES else both[1]]
            )
        )
        challenge = f'Bearer realm="{REALM}",service="{AUDIENCE}"'
        if needs:
            challenge += ',scope="' + " ".join(f"repository:{need}:pull" for need in needs) + '"'
        answer = front.get(path)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, challenge), name
        basic = front.get(
            path,
            headers={"Authorization": "Basic " + base64.b64encode(b"d_1:secret word").decode()},
        )
        assert (basic.status, basic.headers["www-authenticate"]) == (401, challenge)
        for bad in invalid.values():
            answer = front.get(path, bad)
            assert (answer.status, answer.headers["www-authenticate"]) == (
                401,
                challenge + ',error="invalid_token"',
            )
    assert front.get("/healthz").status == 200


def test_an_alias_grants_access_to_its_repository(front: Front, pair: Pair) -> None:
    access = [
        {**pulls(BASE_REPOSITORY)[0], "alias": "fleet/old"},
        {**pulls(TARGET_REPOSITORY)[0], "alias": "fleet/new"},
    ]
    token = front.issuer.api_token(access=access)
    answer = front.get(front.question("fleet/old", "fleet/new"), token)
    assert answer.status == 200
    name = Reference.parse(json.loads(answer.body)["name"])
    assert name.repository == TARGET_REPOSITORY
    assert front.get(f"/v2/{name.repository}/manifests/{name.tag}", token).status == 200
    assert front.get(f"/v2/fleet/new/manifests/{name.tag}", token).status == 200
    assert front.get("/v2/fleet/old/manifests/latest", token).body == pair.base.manifest
    for less in ([access[0]], [access[1]], [access[0], pulls(BIG_REPOSITORY)[0]]):
        refused = front.get(
            front.question("fleet/old", "fleet/new"), front.issuer.api_token(access=less)
        )
        assert refused.status == 403
    plain = front.issuer.api_token(BASE_REPOSITORY, TARGET_REPOSITORY)
    assert front.get(front.question("fleet/old", "fleet/new"), plain).status == 403


def test_an_alias_never_grants_access_to_a_repository_of_the_same_name(
    front: Front, token: str, pair: Pair
) -> None:
    shown = faces(front, token, pair)
    access = [*pulls(BASE_REPOSITORY), {**pulls(BIG_REPOSITORY)[0], "alias": TARGET_REPOSITORY}]
    disguised = front.issuer.api_token(access=access)
    for name in ("digest", "delta blob"):
        assert front.get(shown[name], disguised).status == 404, name
    # A delta's tag that is not known in the alias's repository is that repository's own image.
    for name in ("target", "tag"):
        other = front.get(shown[name], disguised)
        assert (
            other.status == 200
            and other.body == front.get(f"/v2/{BIG_REPOSITORY}/manifests/latest", disguised).body
        )
    answer = front.get(shown["api"], disguised)
    assert answer.status == 200
    assert front.get(f"/v2/{BIG_REPOSITORY}/manifests/latest", token).status == 403


def test_a_certificate_swapped_in_mid_download_breaks_nothing(front: Front, big: Image) -> None:
    token = front.issuer.api_token(BIG_REPOSITORY)
    (layer,) = big.layers
    ask = (f"/v2/{BIG_REPOSITORY}/blobs/{layer.digest}", f"Authorization: Bearer {token}")
    old = front.keys.serial("delta")
    first = TlsDevice(front.port, front.keys, source=DEVICE, name=NAME)
    first.ask(*ask)
    beginning = first.read(100_000)
    front.keys.issue("delta", NAME)
    new = front.keys.serial("delta")
    end = time.monotonic() + 60
    while (second := TlsDevice(front.port, front.keys, source=DEVICE, name=NAME)).serial != new:
        second.close()
        assert time.monotonic() < end
        time.sleep(0.1)  # the file is checked once a second
    second.ask(*ask)
    assert first.serial == old != new
    status, whole = second.answer()
    rest = first.read(1 << 30)
    first.close()
    assert beginning.startswith(b"HTTP/1.1 200 ") and status == 200
    for body in ((beginning + rest).partition(b"\r\n\r\n")[2], whole):
        assert hashlib.sha256(body).hexdigest() == layer.digest.hex
    assert (
        f"peer={DEVICE} method=GET path={ask[0]} status=200 bytes={layer.size}" in front.server.log
    )


def test_no_secret_is_in_answers_or_logs(front: Front, token: str, pair: Pair) -> None:
    """No secret is in the logs and refusals so far, nor in those of another run with valid and
    invalid requests, and v2's signed URLs.
    """
    front.get(front.question() + f"&token={token}", token)
    front.get(f"/v2/{BASE_REPOSITORY}/manifests/none", token)
    front.get(f"/v2/{BASE_REPOSITORY}/manifests/latest", token + "x")
    front.get("/v2/", headers={"Authorization": f"Basic {token}"})
    located = front.get(front.question(version=2), token)
    assert located.status == 300
    url = located.headers["location"].removeprefix(front.url)
    signature = re.search(r"signature=([0-9a-f]{64})", url)
    assert signature is not None
    assert front.get(url).status == 200
    assert front.get(url.replace(signature[1], "0" * 64)).status == 403
    assert front.get(url + "&more=1").status == 403
    secrets = {
        signature[1],
        BUILDER_TOKEN,
        base64.b64encode(f"builder:{BUILDER_TOKEN}".encode()).decode(),
    }
    secrets |= set(private_pem(front.issuer.key).decode().splitlines()[1:-1])
    secrets |= {
        line
        for line in (front.keys.folder / "delta.pem").read_text().splitlines()
        if "-----" not in line
    }
    url_key = (front.server.state_dir / "url-key").read_bytes()
    secrets |= {url_key.hex(), base64.b64encode(url_key).decode()}
    for signed in front.issuer.signed:
        secrets |= set(signed.split(".")[1:])
    assert len(secrets) > 20 and all(len(secret) >= 4 for secret in secrets)
    answers = [front.server.log, *(body.decode("utf-8", "replace") for body in front.answers)]
    assert len(answers) > 10 and f"peer={DEVICE}" in answers[0]
    for text in answers:
        assert not [len(secret) for secret in secrets if secret in text]
        assert "Traceback" not in text
