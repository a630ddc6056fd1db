"""`obdelta explain` and `obdelta export` as a user runs them: with a server's store, as a device,
and with a local build.
"""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdelta.device.http import Http
from obdelta.oci import DiffID, parse_config
from tests.support.commands import OBDELTA, environment, error_of, on_terminal, run
from tests.support.dockerd import RunningDockerd, dockerd
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair, make_pair
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer, free_port, running_server

__all__ = ["dockerd"]

HOST = "registry.example.com"
BASE, TARGET = f"{HOST}/{BASE_REPOSITORY}", f"{HOST}/{TARGET_REPOSITORY}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), size=1 << 20)


@pytest.fixture(scope="module")
def server(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Yields a server that has finished both forms of the delta of the pair."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder / "state", upstream=f"oci:{pair.root}", registry_hosts=HOST) as up:
        run("check", BASE, TARGET, "--server", up.url, "--registry", up.url)
        until_both_forms(up)
        yield up


# -- explain -----------------------------------------------------------------------------------


EXPLAINED = """\
delta v2/{target}:{tag}
from v2/{base}@{base_digest}
to v2/{target}@{target_digest}
full update N bytes
delta N bytes (N saved)
literals N bytes, before compression
copied N bytes, from the base
copies N (N a MB, N of less than N bytes)
device disk N bytes, about, for the layers that it does not have yet

layer delta bytes literal bytes of layer bytes copies a MB changed
N N shared with the base
N N N N N N N of N entries
N N N N N N N of N entries
N N N N N N N of N entries
N N N N N N copied whole from the base
N N N N N N no entries

delta bytes, about literal bytes of file bytes copies layer change entry
N N N N N new usr/lib/modules/added.txt
N N N N N edited usr/lib/modules/m04.txt

would save, about advice for the next release
N layer N is sent again because layer N below it changed: put it lower (N bytes of a\
 device's disk)"""


def explained(pair: Pair, report: dict[str, object]) -> str:
    return EXPLAINED.format(
        base="a1" * 16,
        target="b2" * 16,
        tag=report["tag"],
        base_digest=pair.base.digest,
        target_digest=pair.target.digest,
    )


def test_explain_as_text_and_json(server: RunningServer, pair: Pair) -> None:
    output = json.loads(
        run("explain", BASE, TARGET, "--json", "--operator", server.operator_url).stdout
    )
    text = run(
        "explain", BASE, TARGET, "--top", 2, "--operator", server.operator_url
    ).stdout.decode()
    assert normal(text) == explained(pair, output["delta"])
    report = output["report"]
    # Every number of the text, from the JSON.
    assert (
        f"delta        {report['delta_bytes']:>15,} bytes ({report['saving']:.1%} saved)\n" in text
    )
    assert (
        f"copies       {report['copies']:>15,} ({report['copies_per_mb']:.1f} a MB,"
        f" {report['small_copies']:,} of" in text
    )
    for layer in report["layers"]:
        (cells,) = [
            line.split() for line in text.splitlines() if line.startswith(f"{layer['number']}  ")
        ]
        shown = [
            layer[name] for name in ("number", "wire_bytes", "literal_bytes", "size", "copies")
        ]
        assert cells[:6] == [*(f"{value:,}" for value in shown), f"{layer['copies_per_mb']:.1f}"]
    for file, line in zip(report["files"], text.split("\n\n")[2].splitlines()[1:], strict=False):
        shown = [file[name] for name in ("wire_bytes", "literal_bytes", "size", "copies", "layer")]
        assert line.split() == [*(f"{value:,}" for value in shown), file["change"], file["name"]]
    # And the JSON, against the images.
    layers = pair.target.layers[1:]
    assert [layer["diff_id"] for layer in report["layers"]] == [
        str(layer.diff_id) for layer in layers
    ]
    assert [layer["size"] for layer in report["layers"]] == [layer.tar_size for layer in layers]
    assert report["disk_bytes"] == sum(layer.tar_size for layer in layers)
    assert report["delta_bytes"] >= sum(layer["wire_bytes"] for layer in report["layers"])
    for layer in report["layers"]:
        parts = [*layer["files"], layer["rest"]] if layer["rest"] is not None else []
        assert not parts or sum(part["wire_bytes"] for part in parts) == layer["wire_bytes"]
    assert report["files"][0]["name"] == "usr/lib/modules/added.txt"


BATCH = """\
delta v2 batch sha256:{content}
from v2/{base}@{base_digest}
to v2/{target}@{target_digest}
full update N bytes
delta N bytes (N saved)
file list N bytes, of all files
files sent N bytes, of N files with N bytes
copied N bytes, from files of the same names, in N runs

delta bytes copied bytes of file bytes runs file
N N N N usr/lib/modules/vendored/table.bin
N N N N usr/bin/interpreter"""


def test_explain_a_batch(server: RunningServer, pair: Pair) -> None:
    where = ("--kind", "v2", "--operator", server.operator_url)
    assert "there is no finished v2 delta" in error_of(
        run("explain", BASE, TARGET, *where, status=1)
    )
    assert "use neither --build nor --upstream" in error_of(
        run("explain", "a/b", "a/c", "--kind", "v2", "--build", status=2)
    )
    device = Http(user_agent="Supervisor/14.9.4 (Linux)")
    with device.request(
        "GET", f"{server.url}/api/v2/delta?src={BASE}&dest={TARGET}&wait=true"
    ) as answer:
        assert answer.status == 300
        location = answer.headers["location"]
    with device.request("GET", location) as answer:
        size = len(answer.small(1 << 30))
    output = json.loads(run("explain", BASE, TARGET, "--json", *where).stdout)
    report = output["report"]
    assert report["delta_bytes"] == size
    assert 0 < report["head"] + report["wire_bytes"] < size
    assert sum(file["wire_bytes"] for file in report["top"]) <= report["wire_bytes"]
    assert (
        report["top"][0]["name"] == "usr/lib/modules/vendored/table.bin"
    )  # moved there, so all of it
    text = run("explain", BASE, TARGET, "--top", 2, *where).stdout.decode()
    assert normal(text) == BATCH.format(
        content=output["delta"]["content"].removeprefix("sha256:"),
        base="a1" * 16,
        target="b2" * 16,
        base_digest=pair.base.digest,
        target_digest=pair.target.digest,
    )
    page = f"/pairs/v2/{output['delta']['recipe']}/{pair.base.digest.hex}/{pair.target.digest.hex}"
    with device.request("GET", server.operator_url + page) as answer:
        html = answer.small(1 << 20).decode()
    assert (
        "usr/lib/modules/vendored/</span>table.bin" in html
        and "are copied from the files of the same names" in html
    )


def test_explain_by_digest_and_by_an_own_build_print_the_same(
    server: RunningServer, pair: Pair
) -> None:
    by_name = run("explain", BASE, TARGET, "--operator", server.operator_url).stdout
    names = f"{BASE}@{pair.base.digest}", f"{TARGET}@{pair.target.digest}"
    assert run("explain", *names, "--operator", server.operator_url).stdout == by_name
    names = f"{BASE}:latest", f"{TARGET}:latest"
    assert run("explain", *names, "--operator", server.operator_url).stdout == by_name
    names = BASE_REPOSITORY, f"{TARGET_REPOSITORY}:latest"
    assert run("explain", *names, "--upstream", f"oci:{pair.root}").stdout == by_name


def test_explain_by_an_id_of_the_list(server: RunningServer) -> None:
    where = ("--operator", server.operator_url)
    kept = json.loads(run("list", *where, "--json").stdout)["deltas"]
    kept = [one for one in kept if one["dest"].startswith(f"{TARGET_REPOSITORY}@")]
    assert {one["form"] for one in kept} == {"gzip", "zstd"}
    for entry in kept:
        which = ("--kind", entry["kind"], "--form", entry["form"])
        named = run("explain", BASE, TARGET, *which, *where).stdout
        assert run("explain", entry["id"], *where).stdout == named
        shown = json.loads(run("explain", entry["id"], *where, "--json").stdout)["delta"]
        assert (shown["id"], shown["form"]) == (entry["id"], entry["form"])
    unknown = error_of(run("explain", "0" * 16, *where, status=1))
    assert "no delta, build or failure has this ID" in unknown
    here = error_of(run("explain", kept[0]["id"], "--build", status=2))
    assert here == "obdelta: an ID is one of a server's store: name two images instead"


def test_a_missing_delta_is_reported_in_one_line(
    server: RunningServer, pair: Pair, tmp_path: Path
) -> None:
    where = ("--operator", server.operator_url)
    output = f"obdelta: the server at {server.operator_url} says: "
    other = f"{HOST}/v2/{'0' * 32}"
    for command in (["explain"], ["export", "-o", tmp_path / "x"]):
        ran = run(*command, BASE, other, *where, status=1)
        assert error_of(ran) == f"{output}there is no finished v3 delta from {BASE} to {other}"
        ran = run(*command, BASE, f"{TARGET}@{pair.base.digest}", *where, status=1)
        assert error_of(ran).startswith(f"{output}there is no finished v3 delta")
        ran = run(*command, BASE, f"{TARGET}:none", *where, status=1)
        assert error_of(ran).startswith(output) and "manifest none is unknown" in error_of(ran)
        assert "bad image reference" in error_of(run(*command, BASE, "UPPER", *where, status=1))
        devices = run(*command, BASE, TARGET, "--operator", server.url, status=1)
        assert error_of(devices).endswith(
            "answered 404: is it the operators' endpoint of an obdelta?"
        )
        nobody = f"http://127.0.0.1:{free_port()}"
        ran = run(*command, BASE, TARGET, "--operator", nobody, status=1)
        assert (
            error_of(ran)
            == f"obdelta: the server at {nobody} cannot be reached: Connection refused"
        )
        ran = run(*command, BASE, TARGET, "--operator", "delta.example.com", status=2)
        assert "'delta.example.com' is not the URL of an operators' endpoint" in error_of(ran)
        ran = run(*command, BASE, TARGET, *where, "--build", status=2)
        assert "use only one of --operator, --server and --build" in error_of(ran)
    assert not list(tmp_path.iterdir())


def test_the_endpoint_comes_from_the_settings(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.operator_url.rpartition(":")[2]
    file = tmp_path / "tap.conf"
    file.write_text(f"[obdelta]\noperator-listen = tcp:{port}:interface=127.0.0.1\n")
    expected = run("explain", BASE, TARGET, "--operator", server.operator_url).stdout
    assert run("explain", BASE, TARGET, "-c", file).stdout == expected
    monkeypatch.setenv("OBDELTA_OPERATOR_LISTEN", f"tcp:port={port}")
    assert run("explain", BASE, TARGET).stdout == expected
    monkeypatch.setenv("OBDELTA_OPERATOR_LISTEN", "systemd:domain=INET:index=0")
    assert "or use --operator" in error_of(run("explain", BASE, TARGET, status=2))


# -- export ------------------------------------------------------------------------------------


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
