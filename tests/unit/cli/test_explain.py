"""`obdelta explain` as a user runs it: with a server's store, as a device, and with a build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdelta.device.http import Http
from tests.support.commands import HOST, error_of, run
from tests.support.finished_delta import BASE, TARGET, pair, server
from tests.support.golden import normal
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, Pair
from tests.support.server import RunningServer, free_port

__all__ = ["pair", "server"]


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
