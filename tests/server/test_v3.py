"""v3 end to end: the real server, Debian's docker-registry as upstream, and the device of
``obdelta check``.

Debian's rdiff, an independent program, also patches every layer of every delta.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.images import make_image, push
from bench.registry import serving
from obdelta.device.http import Http
from obdelta.device.pull import Engine
from obdelta.device.update import Device, Update
from obdelta.oci import Reference, common_prefix
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.server import RunningServer, running_server


def sha256_of(path: Path) -> str:
    return subprocess.check_output(["sha256sum", str(path)], text=True).split()[0]


def names(server: RunningServer) -> tuple[str, str]:
    return f"{server.host}/{BASE_REPOSITORY}", f"{server.host}/{TARGET_REPOSITORY}"


def device_of(server: RunningServer) -> Device:
    http = Http(timeout=30)
    return Device(http, Engine(http, registry=server.url), server.url)


def update(server: RunningServer, work: Path) -> Update:
    work.mkdir()
    device = device_of(server)
    base, target = names(server)
    return device.update(device.load_base(Reference.parse(base), work), base, target, work)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=2 << 20)


@pytest.fixture(scope="module")
def registry(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("registry")) as url:
        push(pair.base, url, BASE_REPOSITORY)
        push(pair.target, url, TARGET_REPOSITORY)
        yield url


@pytest.fixture
def server(registry: str, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "state", upstream=registry) as running:
        yield running


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def ask(server: RunningServer, src: str, dest: str, extra: str = "") -> tuple[int, bytes]:
    status, _, body = get(f"{server.url}/api/v3/delta?src={src}&dest={dest}{extra}")
    return status, body


def test_a_device_updates_and_every_layer_also_passes_rdiff(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    done = update(server, tmp_path / "device")
    assert done.is_delta
    assert str(done.image_id) == str(pair.target.image_id)
    assert done.pulled_bytes < done.full_bytes
    status, body = ask(server, *names(server))
    assert status == 200
    name = Reference.parse(json.loads(body)["name"])
    image = Engine(Http(), registry=server.url).pull(name)
    concatenated = tmp_path / "base.tar"
    with concatenated.open("wb") as out:
        for number, layer in enumerate(pair.base.layers):
            one = tmp_path / f"base-{number}.tar"
            layer.write_tar(one)
            out.write(one.read_bytes())
    shared = common_prefix(pair.base.diff_ids, pair.target.diff_ids)
    assert len(image.manifest.layers) == len(pair.target.layers) >= 4
    for number in range(len(pair.target.layers)):
        blob, stream, made = (tmp_path / f"{number}.{kind}" for kind in ("blob", "stream", "made"))
        Engine(Http(), registry=server.url).download(image, image.manifest.layers[number], blob)
        with tarfile.open(blob) as tar:
            member = tar.next()
            assert member is not None
            assert (member.name, member.mode) == ("delta", 0o600)
            inner = tar.extractfile(member)
            assert inner is not None
            stream.write_bytes(inner.read())
        # For a shared layer there is a copy: an engine skips it, or applies it in a host-OS
        # update.
        assert number >= shared or (
            stream.stat().st_size < 24 and image.manifest.layers[number].size < 90
        )
        subprocess.run(["rdiff", "patch", str(concatenated), str(stream), str(made)], check=True)
        assert f"sha256:{sha256_of(made)}" == str(pair.target.diff_ids[number])


def test_fifty_devices_at_once_share_one_build(server: RunningServer, tmp_path: Path) -> None:
    device = device_of(server)
    (tmp_path / "base").mkdir()
    base_name, target_name = names(server)
    base = device.load_base(Reference.parse(base_name), tmp_path / "base")

    def one(number: int) -> Update:
        work = tmp_path / f"device-{number}"
        work.mkdir()
        return device_of(server).update(base, base_name, target_name, work)

    with ThreadPoolExecutor(50) as threads:
        updates = list(threads.map(one, range(50)))
    assert all(done.is_delta for done in updates)
    assert len({done.name for done in updates}) == 1
    assert server.log.count("form=gzip outcome=ready") == 1


def test_state_survives_a_restart(registry: str, tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=registry) as first:
        port = first.port
        before = update(first, tmp_path / "before")
    with running_server(tmp_path / "state", upstream=registry, port=port) as second:
        after = update(second, tmp_path / "after")
        assert (
            second.log.count("form=gzip outcome=ready") == 1
        )  # the log is appended to: it has the first server's build, and no other
    assert after.name == before.name


def test_the_same_pair_gives_the_same_bytes(registry: str, tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        with running_server(tmp_path / f"state{number}", upstream=registry) as server:
            update(server, tmp_path / f"device{number}")
            _, body = ask(server, *names(server))
            digests.append(
                Engine(Http(), registry=server.url)
                .pull(Reference.parse(json.loads(body)["name"]))
                .manifest.digest
            )
    assert digests[0] == digests[1]


def test_a_tag_that_names_the_base_builds_without_the_api(
    server: RunningServer, tmp_path: Path, pair: Pair
) -> None:
    tag = f"delta-{BASE_REPOSITORY.removeprefix('v2/')}"
    image = Engine(Http(), registry=server.url).pull(Reference(server.host, TARGET_REPOSITORY, tag))
    labels = image.config.value["config"]["Labels"]
    assert labels["io.resin.delta.base"] == str(pair.base.image_id)
    delta_name = json.loads(ask(server, *names(server))[1])["name"]
    assert (
        Engine(Http(), registry=server.url).pull(Reference.parse(delta_name)).manifest.digest
        == image.manifest.digest
    )


def test_plain_images_stream_through(server: RunningServer, pair: Pair, tmp_path: Path) -> None:
    engine = Engine(Http(), registry=server.url)
    image = engine.pull(Reference(server.host, BASE_REPOSITORY))
    assert image.config.image_id == pair.base.image_id
    for layer in image.manifest.layers:
        engine.download(image, layer, tmp_path / "blob")
    largest = max(image.manifest.layers, key=lambda layer: layer.size)
    whole = get(f"{server.url}/v2/{BASE_REPOSITORY}/blobs/{largest.digest}")[2]
    status, headers, part = get(
        f"{server.url}/v2/{BASE_REPOSITORY}/blobs/{largest.digest}", Range="bytes=10-"
    )
    assert (status, part) == (206, whole[10:])
    assert headers["content-range"] == f"bytes 10-{largest.size - 1}/{largest.size}"
    status, headers, body = get(
        f"{server.url}/v2/{BASE_REPOSITORY}/blobs/{largest.digest}", method="HEAD"
    )
    assert (status, body, headers["content-length"]) == (200, b"", str(largest.size))


def test_delta_blobs_have_ranges(server: RunningServer, tmp_path: Path) -> None:
    update(server, tmp_path / "device")
    name = Reference.parse(json.loads(ask(server, *names(server))[1])["name"])
    image = Engine(Http(), registry=server.url).pull(name)
    largest = max(image.manifest.layers, key=lambda layer: layer.size)
    url = f"{server.url}/v2/{name.repository}/blobs/{largest.digest}"
    status, headers, whole = get(url)
    assert (status, len(whole)) == (200, largest.size)
    assert headers["docker-content-digest"] == str(largest.digest)
    status, headers, part = get(url, Range=f"bytes={largest.size - 7}-")
    assert (status, part) == (206, whole[-7:])
    assert get(url, Range=f"bytes={largest.size}-")[0] == 416
    assert get(url, method="HEAD")[:1] == (200,)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("src=a.example/x", 400),
        ("dest=a.example/x", 400),
        ("src=&dest=", 400),
        ("src={base}&src={base}&dest={target}", 400),
        ("src=other.example/x&dest={target}", 400),
        ("src={base}&dest=other.example/x", 400),
        ("src={host}/../etc&dest={target}", 400),
        ("src={host}/v2/%2e%2e/x&dest={target}", 400),
        ("src={host}/" + "a" * 10000 + "&dest={target}", 400),
        ("src={base}&dest={host}/v2/UPPER", 400),
        ("src={base}&dest={target}@sha256:123", 400),
        ("src={base}&dest={target}:delta-0123456789abcdef", 400),
        ("src={base}%00&dest={target}", 400),
        ("src={base}&dest=%ff{target}", 400),
        ("src={base}&dest={host}/v2/unknown", 404),
        ("src={base}&dest={target}:unknown", 404),
    ],
)
def test_bad_requests_are_refused(server: RunningServer, query: str, status: int) -> None:
    base, target = names(server)
    url = f"{server.url}/api/v3/delta?{query.format(base=base, target=target, host=server.host)}"
    found, _, body = get(url)
    assert found == status
    assert body.count(b"\n") == 1
    assert b"Traceback" not in body


def test_a_missing_base_is_answered_with_the_targets_own_name(server: RunningServer) -> None:
    _, target = names(server)
    status, body = ask(server, f"{server.host}/v2/{'0' * 32}", target)
    assert (status, json.loads(body)) == (200, {"name": target})
    assert "category=base-gone" in server.log


def test_a_delta_that_is_too_large_is_answered_with_the_targets_own_name(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(
        state, upstream=registry, max_delta_ratio="0.0001", device_link="metered"
    ) as server:
        done = update(server, tmp_path / "device")
        assert not done.is_delta
        assert done.name == names(server)[1]
        assert "category=not-worth" in server.log
        assert server.log.count("outcome=skipped") == 1 and "outcome=failed" not in server.log
        with urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=60) as answer:
            skipped = (
                'obdelta_builds_total{kind="v3",outcome="skipped",reason="delta-too-large"} 1.0'
            )
            assert skipped in answer.read().decode()


def test_a_delta_that_saves_little_is_served_if_the_update_takes_less_time(
    registry: str, tmp_path: Path
) -> None:
    with running_server(tmp_path / "state", upstream=registry, max_delta_ratio="0.0001") as server:
        assert update(server, tmp_path / "device").is_delta


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/v2/", f"/v2/{BASE_REPOSITORY}/blobs/uploads/", "/api/v3/delta"])
def test_other_methods_are_refused(server: RunningServer, method: str, path: str) -> None:
    assert get(server.url + path, method=method)[0] == 405


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/nothing/manifests/latest", 404),
        (f"/v2/{BASE_REPOSITORY}/manifests/none", 404),
        (f"/v2/{BASE_REPOSITORY}/blobs/sha256:{'0' * 64}", 404),
        (f"/v2/{BASE_REPOSITORY}/blobs/nonsense", 400),
        ("/v2/../etc/manifests/passwd", 400),
        ("/v2/%2e%2e/%2e%2e/manifests/x", 400),
        ("/nowhere", 404),
    ],
)
def test_missing_images_and_blobs_have_clear_errors(
    server: RunningServer, path: str, status: int
) -> None:
    found, headers, body = get(server.url + path)
    assert found == status
    if path.startswith("/v2/"):
        assert headers["content-type"].startswith("application/json")
        assert json.loads(body)["errors"]


def test_a_zstd_target_always_gets_its_delta(tmp_path: Path) -> None:
    """Engines on devices cannot inflate zstd, so the target's own name would not help."""
    pair = make_pair(tmp_path / "pair", compression="zstd", format="oci")
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{pair.root}",
        max_delta_ratio="0.0001",
        device_link="metered",
    ) as server:
        assert update(server, tmp_path / "device").is_delta


@pytest.mark.parametrize("known", [False, True], ids=["layers never seen", "layers known"])
def test_images_that_differ_only_in_the_config(tmp_path: Path, known: bool) -> None:
    """If the delta is worth it, each layer is a copy, and only layers of unknown size are fetched;
    otherwise none is.
    """
    pair = make_pair(tmp_path / "pair", compression="zstd", format="oci")
    other = make_image(
        pair.base.layers, pair.root / "v2/other", format="oci", labels={"release": "1a"}
    )
    with running_server(
        tmp_path / "state", upstream=f"oci:{pair.root}", max_delta_ratio="0.0001"
    ) as server:
        if known:
            assert ask(server, *names(server))[0] == 200
        (tmp_path / "device").mkdir()
        base_name, other_name = names(server)[0], f"{server.host}/v2/other"
        base = device_of(server).load_base(Reference.parse(base_name), tmp_path / "device")
        done = device_of(server).update(base, base_name, other_name, tmp_path / "device")
        assert done.is_delta and done.image_id == other.image_id
        assert done.pulled_bytes < done.full_bytes + 10_000  # both have only the two documents
        image = Engine(Http(), registry=server.url).pull(Reference.parse(done.name))
        assert all(layer.size < 90 for layer in image.manifest.layers)


def test_only_the_config_differs_and_a_full_pull_is_as_small(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair")
    make_image(pair.base.layers, pair.root / "v2/other", labels={"release": "1a"})
    with running_server(tmp_path / "state", upstream=f"oci:{pair.root}") as server:
        target = f"{server.host}/v2/other"
        status, body = ask(server, names(server)[0], target)
        assert (status, json.loads(body)["name"]) == (200, target)
        assert not list((tmp_path / "state/layers").glob("*.tar"))
