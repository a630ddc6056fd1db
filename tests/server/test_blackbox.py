"""The same devices with every combination of ``publish``, ``builder``, ``delta-compression`` and
``processes``: the real server, a real registry with token authentication, the device of ``obdelta
check``.

The engine of ``builder = balena-engine`` is a double (``tests/support/engine_double.py``).
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from obdelta.delta.layer_tar import layer_copies
from obdelta.device.http import Http
from obdelta.device.pull import AGENTS, Engine
from obdelta.oci import Digest, Form, Reference, common_prefix
from tests.support.engine_double import builders_token, running_engine
from tests.support.engine_images import EngineDouble
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY, make_pair
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer
from tests.support.stack import Stack, running_stack

COMBINATIONS = list(
    itertools.product(
        ("serve", "registry"),
        ("native", "balena-engine"),  # the engine builds gzip, whatever the setting is
        ("auto", "gzip", "zstd"),
        (1, 2),
    )
)


@dataclass
class Installation:
    """One combination, running."""

    publish: str
    builder: str
    compression: str
    stack: Stack
    engine: EngineDouble
    server: RunningServer

    @property
    def host(self) -> str:
        """The host in the names that devices get."""
        return self.server.host if self.publish == "serve" else self.stack.registry.host

    def best(self, form: Form) -> Form:
        """Returns the form that an engine gets if it reads ``form``."""
        makes_zstd = self.builder == "native" and self.compression != "gzip"
        return form if makes_zstd else Form.GZIP


def name_of(combination: Sequence[object]) -> str:
    return "-".join(map(str, combination))


# The same objects in the same order as in COMBINATIONS: pytest shares the installations.
served_here = pytest.mark.parametrize(
    "installation",
    [each for each in COMBINATIONS if each[0] == "serve"],
    ids=name_of,
    indirect=True,
)
"""The combinations in which the server itself, and not the registry, serves the manifest."""


@pytest.fixture(scope="module", params=COMBINATIONS, ids=name_of)
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    publish, builder, compression, processes = request.param
    root = tmp_path_factory.mktemp("blackbox")
    with (
        running_stack(root / "stack", make_pair(root / "pair")) as stack,
        running_engine(stack.registry.url, builders_token(stack.registry.tokens)) as engine,
        stack.server(
            publish=publish,
            builder=builder,
            delta_compression=compression,
            processes=str(processes),
            docker_host=engine.url,
        ) as server,
    ):
        made = Installation(publish, builder, compression, stack, engine, server)
        # A newer device is the first; the form for older ones is built afterwards.
        stack.name(server, Form.ZSTD)
        if compression == "auto" and made.best(Form.ZSTD) is Form.ZSTD:
            until_both_forms(server)
        yield made


def test_a_device_updates(installation: Installation, tmp_path: Path) -> None:
    stack, server = installation.stack, installation.server
    update = stack.update(server, tmp_path / "work")
    assert update.is_delta and update.image_id == stack.pair.target.image_id and update.saving > 0.5
    name = Reference.parse(update.name)
    assert (name.host, name.repository) == (installation.host, TARGET_REPOSITORY)
    assert name.tag is not None and name.tag.startswith("delta-")
    if installation.builder == "balena-engine":
        assert "POST /v1.35/images/delta" in installation.engine.requests
        assert {pull["username"] for pull in installation.engine.pulls} == {"builder"}
        # It was only pulled for the build.
        assert installation.engine.images == []
    else:
        assert installation.engine.requests == []


@pytest.mark.parametrize("form", [None, *Form], ids=str)
def test_each_engine_gets_a_form_that_it_reads(
    installation: Installation, form: Form | None, tmp_path: Path
) -> None:
    """An engine that does not name itself gets gzip. The delta leads to the same image in each
    form.
    """
    stack = installation.stack
    update = stack.update(installation.server, tmp_path / "work", form=form)
    assert update.is_delta and update.image_id == stack.pair.target.image_id
    name = Reference.parse(update.name)
    device = stack.device(installation.server, name.repository, BASE_REPOSITORY, form=form)
    image = device.engine.pull(name)
    wanted = installation.best(form or Form.GZIP)
    copy, *deltas = image.manifest.layers
    assert image.manifest.media_type == wanted.traits.manifest_type
    assert copy.media_type == wanted.traits.copy_type
    assert {layer.media_type for layer in deltas} == {wanted.traits.layer_type}
    for number, layer in enumerate(deltas):
        out = tmp_path / f"layer-{number}"
        device.engine.download(image, layer, out)
        with out.open("rb") as file:
            magic = file.read(4)
        assert magic[:2] == b"\x1f\x8b" if wanted is Form.GZIP else magic == b"\x28\xb5\x2f\xfd"


@served_here
def test_a_manifest_by_tag_depends_on_the_engine_and_by_digest_on_nothing(
    installation: Installation,
) -> None:
    stack, server = installation.stack, installation.server
    name = Reference.parse(stack.name(server))
    url = f"http://{name.host}/v2/{name.repository}/manifests"
    token = {"Authorization": f"Bearer {stack.token()}"}
    digests: dict[Form, str] = {}
    for form in Form:
        http = Http(AGENTS[form], timeout=60)
        for method in ("HEAD", "GET"):
            with http.request(method, f"{url}/{name.tag}", token) as answer:
                assert answer.status == 200 and "User-Agent" in answer.headers["vary"]
                assert (
                    answer.headers["content-type"] == installation.best(form).traits.manifest_type
                )
                digest = answer.headers["docker-content-digest"]
                assert answer.headers["etag"] == f'"{digest}"'
                assert digests.setdefault(form, digest) == digest
                assert method == "HEAD" or str(Digest.of(answer.small(1 << 20))) == digest
    assert (digests[Form.GZIP] == digests[Form.ZSTD]) == (installation.best(Form.ZSTD) is Form.GZIP)
    for digest in digests.values():
        for agent in AGENTS.values():
            with Http(agent, timeout=60).request("GET", f"{url}/{digest}", token) as answer:
                assert answer.headers["docker-content-digest"] == digest
                assert "User-Agent" not in answer.headers["vary"]


@served_here
def test_config_and_manifest_are_smaller_for_a_client_that_takes_gzip(
    installation: Installation,
) -> None:
    """As in engines' requests: all engines accept gzip for manifests, 25 for configs; none for
    HEAD and ranges.
    """
    stack, server = installation.stack, installation.server
    name = Reference.parse(stack.name(server))
    manifest = stack.device(server).engine.pull(name).manifest
    url = f"http://{name.host}/v2/{name.repository}"
    token = {"Authorization": f"Bearer {stack.token()}"}
    for path, digest in (
        (f"manifests/{name.tag}", manifest.digest),
        (f"manifests/{manifest.digest}", manifest.digest),
        (f"blobs/{manifest.config.digest}", manifest.config.digest),
    ):
        with Http().request("GET", f"{url}/{path}", token) as answer:
            bare, plain = answer.small(1 << 20), answer.headers
            assert "content-encoding" not in plain and plain["etag"] == f'"{digest}"'
        taking = token | {"Accept-Encoding": "deflate, gzip;q=0.5"}
        with Http().request("GET", f"{url}/{path}", taking) as answer:
            packed, headers = answer.small(1 << 20), answer.headers
        assert gzip.decompress(packed) == bare and Digest.of(bare) == digest
        assert len(packed) < 0.7 * len(bare) and headers["content-length"] == str(len(packed))
        assert headers["content-encoding"] == "gzip" and "Accept-Encoding" in headers["vary"]
        assert headers["docker-content-digest"] == str(digest)
        assert headers["etag"] == f'"{digest}-gzip"' != plain["etag"]
        with Http().request("HEAD", f"{url}/{path}", taking) as answer:
            assert answer.headers["content-length"] == str(len(packed))
            assert answer.headers["etag"] == headers["etag"]
        known = taking | {"If-None-Match": headers["etag"]}
        with Http().request("GET", f"{url}/{path}", known) as answer:
            assert answer.status == 304
        for refusal in ("identity", "gzip;q=0", "gzip; q=0.0", "br"):
            refusing = token | {"Accept-Encoding": refusal}
            with Http().request("GET", f"{url}/{path}", refusing) as answer:
                assert answer.small(1 << 20) == bare and "content-encoding" not in answer.headers
    part = token | {"Accept-Encoding": "gzip", "Range": "bytes=10-19"}
    with Http().request("GET", f"{url}/blobs/{manifest.config.digest}", part) as answer:
        assert answer.status == 206 and answer.small(100) == bare[10:20]
    layer = manifest.layers[-1].digest
    with Http().request(
        "GET", f"{url}/blobs/{layer}", token | {"Accept-Encoding": "gzip"}
    ) as answer:
        assert "content-encoding" not in answer.headers


@served_here
def test_an_old_engine_is_refused_zstd_and_gets_gzip_at_the_next_pull(
    installation: Installation, tmp_path: Path
) -> None:
    """It comes back with the manifest of the newer engine that was rolled back."""
    stack, server = installation.stack, installation.server
    name = Reference.parse(stack.name(server))
    image = stack.device(server, form=Form.ZSTD).engine.pull(name)
    old = stack.device(server, form=Form.GZIP).engine
    url = f"http://{name.host}/v2/{name.repository}/blobs"
    token = {"Authorization": f"Bearer {stack.token()}"}
    for part in (image.manifest.config, image.manifest.layers[-1]):
        http = Http(AGENTS[Form.GZIP], timeout=60)
        with http.request("GET", f"{url}/{part.digest}", token) as answer:
            body = answer.small(1 << 20)
        if installation.best(Form.ZSTD) is Form.ZSTD:
            assert answer.status == 404 and b"pull the delta again by its tag" in body
        else:
            assert answer.status == 200
    again = old.pull(name)
    old.download(again, again.manifest.layers[-1], tmp_path / "layer")


def test_shared_layers_are_copies_with_each_builder(installation: Installation) -> None:
    """A host-OS update applies the copies from another store, where an empty layer, as
    balena-engine makes it, fails.
    """
    stack = installation.stack
    name = Reference.parse(stack.name(installation.server))
    image = Engine(Http(), stack.token(), registry=f"http://{name.host}").pull(name)
    base, target = stack.pair.base, stack.pair.target
    (copy,) = layer_copies([(base.diff_ids[0], base.layers[0].tar_size)])
    assert common_prefix(base.diff_ids, target.diff_ids) == 1
    assert (image.manifest.layers[0].digest, image.config.diff_ids[0]) == (
        copy.layer.digest,
        copy.layer.diff_id,
    )


def test_the_second_device_gets_the_same_delta_at_once(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    first, builds = stack.name(server), server.log.count("outcome=ready")
    assert {stack.name(server) for _ in range(3)} == {first}
    assert server.log.count("outcome=ready") == builds
    # Although the setting does not name it, gzip is built for the engines that read nothing else.
    forms = {Form.GZIP, installation.best(Form.ZSTD)}
    assert builds == len(forms) or (installation.compression, builds) == ("zstd", 1)


def test_a_device_goes_back_to_the_previous_release(
    installation: Installation, tmp_path: Path
) -> None:
    update = installation.stack.update(
        installation.server, tmp_path / "work", TARGET_REPOSITORY, BASE_REPOSITORY
    )
    assert update.is_delta and update.image_id == installation.stack.pair.base.image_id


def test_the_answer_is_what_supervisors_parse(installation: Installation) -> None:
    for wait in ("", "&wait=true"):
        status, headers, body = installation.stack.ask(installation.server, wait)
        assert status == 200 and headers["content-length"] == str(len(body))
        assert list(json.loads(body)) == ["name"]


def test_a_device_with_v2(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    status, headers, _ = stack.ask(server, version=2)
    assert status == 300 and headers["location"].startswith(f"{server.url}/api/v2/delta/download?")
    # Without a token, as supervisors download.
    with Http(timeout=60).request("GET", headers["location"]) as answer:
        assert answer.status == 200
        content = b"".join(answer.chunks())
    assert json.loads(content[: content.index(0)])["version"] == 2


@pytest.mark.parametrize("version", [2, 3])
def test_a_client_without_a_token_for_both_images_gets_nothing(
    version: int, installation: Installation
) -> None:
    stack, server = installation.stack, installation.server
    source, target = stack.names()
    url = f"{server.url}/api/v{version}/delta?src={source}&dest={target}"
    for token, wanted in (
        (None, 401),
        ("x.y.z", 401),
        (stack.token(TARGET_REPOSITORY), 403),
        (stack.token(BASE_REPOSITORY), 403),
    ):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with Http(timeout=30).request("GET", url, headers) as answer:
            assert answer.status == wanted, (token, answer.small(1000))


def test_a_base_that_is_gone_leads_to_a_full_pull(installation: Installation) -> None:
    stack, server = installation.stack, installation.server
    gone = "v2/" + "0f" * 16
    source, target = stack.names(gone)
    url = f"{server.url}/api/v3/delta?src={source}&dest={target}"
    headers = {"Authorization": f"Bearer {stack.token(gone, TARGET_REPOSITORY)}"}
    with Http(timeout=30).request("GET", url, headers) as answer:
        assert answer.status == 200 and json.loads(answer.small(1000)) == {"name": target}


def test_the_server_reports_that_it_is_ready(installation: Installation) -> None:
    with Http(timeout=30).request("GET", f"{installation.server.operator_url}/readyz") as answer:
        assert answer.status == 200


def test_operators_see_the_delta_and_the_savings(installation: Installation) -> None:
    installation.stack.name(installation.server)
    with Http(timeout=30).request("GET", installation.server.operator_url + "/") as answer:
        page = answer.small(1 << 20).decode()
    assert answer.status == 200 and TARGET_REPOSITORY in page
    pages = set(re.findall(r"/pairs/v3/[0-9]+/[0-9a-f]{64}/[0-9a-f]{64}(?:\?form=zstd)?", page))
    assert pages
    for path in pages:
        with Http(timeout=30).request("GET", installation.server.operator_url + path) as answer:
            assert answer.status == 200, path
