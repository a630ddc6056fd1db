"""`obdelta export`: bundles for offline devices."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from obdelta.device.http import Http
from obdelta.oci import DiffID, parse_config
from tests.support.commands import HOST, OBDELTA, environment, error_of, on_terminal, run
from tests.support.dockerd import RunningDockerd, dockerd
from tests.support.finished_delta import BASE, TARGET, pair, server
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.server import RunningServer, running_server

__all__ = ["dockerd", "pair", "server"]


@pytest.fixture(scope="module")
def bundle(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bundle") / "update.tar"
    ran = run("export", BASE, TARGET, "-o", file, "--operator", server.operator_url)
    assert normal(ran.stdout.decode()).startswith(f"exported {file}: {TARGET}:delta-")
    assert ran.stdout.decode().endswith(" bytes of delta\n")
    return file


def test_a_bundle_patched_with_rdiff_gives_the_target(
    bundle: Path, pair: Pair, tmp_path: Path
) -> None:
    assert_leads_to_the_target(bundle, pair, tmp_path)


def assert_leads_to_the_target(bundle: Path, pair: Pair, tmp_path: Path) -> None:
    """Asserts that an archive's layers, applied to the base by rdiff, are the target's, and the
    image ID too.
    """
    with tarfile.open(bundle) as tar:
        tar.extractall(tmp_path, filter="data")
    (item,) = json.loads((tmp_path / "manifest.json").read_text())
    labels = json.loads((tmp_path / item["Config"]).read_text())["config"]["Labels"]
    assert labels["io.resin.delta.base"] == str(pair.base.image_id)
    raw = labels["io.resin.delta.config"].encode()
    target = parse_config(raw)
    base = tmp_path / "base"
    with base.open("wb") as out:
        for layer in pair.base.layers:
            out.write(layer.write_tar(tmp_path / "layer.tar").read_bytes())
    made = []
    for place, layer in zip(item["Layers"], pair.target.layers, strict=True):
        with tarfile.open(tmp_path / place) as delta:
            stream = delta.extractfile("delta")
            assert stream is not None
            (tmp_path / "delta").write_bytes(stream.read())
        subprocess.run(
            ["rdiff", "-f", "patch", base, tmp_path / "delta", tmp_path / "made"], check=True
        )
        made.append(DiffID.of((tmp_path / "made").read_bytes()))
        assert made[-1] == layer.diff_id
    assert tuple(made) == target.diff_ids
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == str(pair.target.image_id)


def test_an_id_of_the_list_names_the_delta_and_its_form(
    bundle: Path, server: RunningServer, tmp_path: Path
) -> None:
    where = ("--operator", server.operator_url)
    listed = json.loads(run("list", "--kind", "v3", "--json", *where).stdout)["deltas"]
    ids = {entry["form"]: entry["id"] for entry in listed}
    with tarfile.open(bundle) as tar:
        index = tar.extractfile("manifest.json")
        assert index is not None
        (name,) = json.load(index)[0]["RepoTags"]
    file = ("-o", tmp_path / "gzip.tar", "--name", name)
    run("export", ids["gzip"], *file, *where)
    assert (tmp_path / "gzip.tar").read_bytes() == bundle.read_bytes()
    ran = run("export", ids["zstd"], "-o", tmp_path / "zstd.tar", *where)
    assert f"zstd.tar: {TARGET_REPOSITORY}:delta-" in ran.stdout.decode()  # it knows no host
    assert "-zstd, " in ran.stdout.decode()


def test_an_id_that_cannot_be_exported_is_refused(server: RunningServer, tmp_path: Path) -> None:
    where, file = ("--operator", server.operator_url), ("-o", tmp_path / "x.tar")
    device = Http(user_agent="Supervisor/14.9.4 (Linux)")
    path = f"/api/v2/delta?src={BASE}&dest={TARGET}&wait=true"
    with device.request("GET", f"{server.url}{path}") as answer:
        assert answer.status == 300
    listed = json.loads(run("list", "--json", *where).stdout)["deltas"]
    batch = next(entry["id"] for entry in listed if entry["kind"] == "v2")
    image = next(entry["id"] for entry in listed if entry["form"] == "zstd")
    ran = run("export", batch, *file, *where, status=2)
    assert "this delta is a v2 batch, which no engine loads" in error_of(ran)
    ran = run("export", image, "--form", "gzip", *file, *where, status=2)
    assert f"delta {image} is zstd, not gzip: leave out --form" in error_of(ran)
    ran = run("export", image, *file, "--server", server.url, status=2)
    assert "an ID is one of a server's store: name two images instead" in error_of(ran)
    ran = run("export", "0" * 16, *file, *where, status=1)
    assert "no delta, build or failure has this ID" in error_of(ran)
    assert not list(tmp_path.iterdir())


def test_every_source_gives_the_same_bundle(
    bundle: Path, server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    tag = run(
        "export",
        BASE,
        TARGET,
        "--name",
        "fleet/app:next",
        "-o",
        tmp_path / "a",
        "--operator",
        server.operator_url,
    )
    assert normal(tag.stdout.decode()) == f"exported {tmp_path}/a: fleet/app:next, N bytes of delta"
    run(
        "export",
        BASE,
        TARGET,
        "--name",
        "fleet/app:next",
        "-o",
        tmp_path / "b",
        "--server",
        server.url,
        "--registry",
        server.url,
    )
    run(
        "export",
        BASE_REPOSITORY,
        TARGET_REPOSITORY,
        "--name",
        "fleet/app:next",
        "-o",
        tmp_path / "c",
        "--upstream",
        f"oci:{pair.root}",
    )
    piped = run(
        "export",
        BASE,
        TARGET,
        "--name",
        "fleet/app:next",
        "-o",
        "-",
        "--operator",
        server.operator_url,
    )
    made = [(tmp_path / name).read_bytes() for name in "abc"]
    assert made[0] == made[1] == made[2] == piped.stdout
    assert made[0] != bundle.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_other_tools_read_a_bundle(
    bundle: Path, pair: Pair, tmp_path: Path, dockerd: RunningDockerd
) -> None:
    for kind in ("docker-archive", "oci-archive"):
        subprocess.run(
            ["skopeo", "copy", "-q", f"{kind}:{bundle}", f"dir:{tmp_path / kind}"], check=True
        )
    # An engine that is not balena's accepts it as an ordinary image, labels included.
    with bundle.open("rb") as file:
        (loaded,) = dockerd.client.images.load(file)
    try:
        with tarfile.open(bundle) as tar:
            (item,) = json.load(tar.extractfile("manifest.json") or io.BytesIO())
        assert loaded.tags == item["RepoTags"]
        assert loaded.id == "sha256:" + item["Config"].rpartition("/")[2]
        assert loaded.labels["io.resin.delta.base"] == str(pair.base.image_id)
        assert (
            parse_config(loaded.labels["io.resin.delta.config"].encode()).image_id
            == pair.target.image_id
        )
        saved = tmp_path / "saved.tar"
        saved.write_bytes(b"".join(loaded.save(named=True)))
        (tmp_path / "applied").mkdir()
        assert_leads_to_the_target(saved, pair, tmp_path / "applied")
    finally:
        dockerd.client.images.remove(str(loaded.id), force=True)


def test_an_oci_layout(server: RunningServer, bundle: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    where = ("--operator", server.operator_url)
    output = json.loads(
        run("export", BASE, TARGET, "-o", layout, "--format", "oci", "--json", *where).stdout
    )
    assert (output["file"], output["format"]) == (str(layout), "oci")
    tag = output["delta"]["tag"]
    inspected = subprocess.run(
        ["skopeo", "inspect", f"oci:{layout}:{tag}"], check=True, capture_output=True
    ).stdout
    assert "io.resin.delta.base" in json.loads(inspected)["Labels"]
    with tarfile.open(bundle) as tar:
        (digest,) = [
            entry["digest"]
            for entry in json.load(tar.extractfile("index.json") or io.BytesIO())["manifests"]
        ]
    assert json.loads(inspected)["Digest"] == digest
    run("export", BASE, TARGET, "-o", layout, "--format", "oci", "--name", "fleet/app:next", *where)
    assert len(json.loads((layout / "index.json").read_text())["manifests"]) == 2


def test_export_shows_its_progress_on_a_terminal(server: RunningServer, tmp_path: Path) -> None:
    command = ("export", BASE, TARGET, "-o", tmp_path / "update.tar")
    assert b" 100% fetching " in on_terminal(*command, "--operator", server.operator_url)
    as_a_device = on_terminal(*command, "--server", server.url, "--registry", server.url)
    assert b" 100% fetching " in as_a_device


def test_an_interrupted_export_leaves_nothing(server: RunningServer, tmp_path: Path) -> None:
    command = [*OBDELTA, "export", BASE, TARGET, "-o", "-", "--operator", server.operator_url]
    inside = environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=inside
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # more bytes than a pipe holds are still to come
        assert list(tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"obdelta: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing(server: RunningServer, tmp_path: Path) -> None:
    where = ("--operator", server.operator_url)
    out = tmp_path / "x"
    assert "repository:tag" in error_of(
        run("export", BASE, TARGET, "-o", out, "--name", "no/tag", *where, status=1)
    )
    assert "stdout cannot take" in error_of(
        run("export", BASE, TARGET, "-o", "-", "--format", "oci", *where, status=2)
    )
    missing = run("export", BASE, TARGET, "-o", tmp_path / "none/x", *where, status=1)
    assert "No such file or directory" in error_of(missing)
    full = run(
        "export",
        TARGET,
        TARGET,
        "-o",
        out,
        "--server",
        server.url,
        "--registry",
        server.url,
        status=1,
    )
    assert f"gave no delta: a device would pull {TARGET}" in error_of(full)
    assert not list(tmp_path.iterdir())


def test_a_damaged_blob_is_never_exported(pair: Pair, tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=f"oci:{pair.root}", registry_hosts=HOST
    ) as server:
        run("check", BASE, TARGET, "--server", server.url, "--registry", server.url)
        blobs = sorted(
            (path.stat().st_size, path)
            for path in (tmp_path / "state/blobs").rglob("*")
            if path.is_file()
        )
        size, biggest = blobs[-1]
        biggest.write_bytes(bytes(size))
        out = tmp_path / "x"
        ran = run("export", BASE, TARGET, "-o", out, "--operator", server.operator_url, status=1)
        assert error_of(ran).startswith("obdelta: blob has digest sha256:")
        assert not out.exists()
