"""Layers that are lost, or of an older recipe: rebuilt, or retired."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from obdelta.builds.rebuild import LOOK_EVERY, UNVERIFIED_TAIL, Rebuild
from obdelta.errors import DigestMismatch, SizeMismatch
from obdelta.oci import Descriptor, Digest, Form
from obdelta.oci.manifest import DOCKER_LAYER
from obdelta.store.catalogue.evictions import Evicted
from tests.support.evicted_layers import (
    ask,
    change,
    large_layers,
    manifest_of,
    pair,
    path_of,
    registry,
    update,
)
from tests.support.processes import until_both_forms
from tests.support.server import RunningServer, running_server
from tests.support.store import a_key, a_row, real_threads

__all__ = ["pair", "registry"]


def test_after_an_upgrade_that_changes_bytes_old_manifests_are_retired(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry) as server:
        old = ask(server)
        layers = large_layers(manifest_of(server, old))
    change(
        state,
        "UPDATE deltas SET recipe = 0,"
        " tag = 'delta-0000000000000000' || iif(form = 'zstd', '-zstd', '')",
    )
    # While all of it is stored, a device that is pulling it goes on.
    with running_server(state, upstream=registry) as server:
        assert large_layers(manifest_of(server, "x:delta-0000000000000000")) == layers
    path_of(state, layers[0][0]).unlink()
    with running_server(state, upstream=registry) as server:
        # The name outlives its delta: it leads to the target's own manifest.
        manifest_text = json.dumps(manifest_of(server, "x:delta-0000000000000000"))
        assert not any(digest in manifest_text for digest, _ in layers)
        assert update(server, tmp_path / "device")


def test_an_upgrade_retires_deltas_and_verdicts_of_an_older_recipe(
    registry: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry) as server:
        layers = large_layers(manifest_of(server, ask(server)))
    change(
        state,
        "UPDATE deltas SET recipe = 6, last_served = 1,"
        " tag = 'delta-0000000000000000' || iif(form = 'zstd', '-zstd', '')",
    )
    change(
        state,
        "INSERT INTO failures SELECT kind, base, target, '', 'not worth', 'too large', 1,"
        " unixepoch(), '', '', 6 FROM deltas WHERE form = 'gzip'",
    )
    with running_server(state, upstream=registry) as server:
        manifest_text = json.dumps(manifest_of(server, "x:delta-0000000000000000"))
        assert not any(digest in manifest_text for digest, _ in layers)
        assert not path_of(state, layers[0][0]).exists()
        assert update(server, tmp_path / "device")


def test_a_lost_file_is_rebuilt(registry: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running_server(state, upstream=registry) as server:
        name = ask(server)
        layers = large_layers(manifest_of(server, name))
    path_of(state, layers[0][0]).unlink()
    path_of(state, layers[1][0]).write_bytes(b"half")
    with running_server(state, upstream=registry) as server:
        assert ask(server).rpartition(":")[2] == name.rpartition(":")[2]
        assert update(server, tmp_path / "device")


@pytest.mark.parametrize("lost", Form)
@pytest.mark.parametrize("restarted", [True, False], ids=["restarted", "running"])
def test_only_the_form_with_lost_files_is_rebuilt(
    lost: Form, restarted: bool, registry: str, tmp_path: Path
) -> None:
    """The other form's files stay as they are, and each engine gets its own form as before."""
    state = tmp_path / "state"
    (kept,) = set(Form) - {lost}

    def lose(server: RunningServer) -> tuple[dict[Form, dict[str, object]], dict[str, int]]:
        name = ask(server)
        until_both_forms(server)
        manifests = {form: manifest_of(server, name, form) for form in Form}
        layers = {form: large_layers(manifests[form]) for form in Form}
        for digest, _ in layers[lost]:
            path_of(state, digest).unlink()
        return manifests, {d: path_of(state, d).stat().st_mtime_ns for d, _ in layers[kept]}

    def check(
        server: RunningServer, manifests: dict[Form, dict[str, object]], times: dict[str, int]
    ) -> None:
        name = ask(server)
        for form in Form:
            assert update(server, tmp_path / form.value, form)
            assert manifest_of(server, name, form) == manifests[form]
        for digest, size in large_layers(manifests[lost]):
            assert path_of(state, digest).stat().st_size == size
        assert {d: path_of(state, d).stat().st_mtime_ns for d in times} == times

    with running_server(state, upstream=registry) as server:
        found = lose(server)
        if not restarted:
            check(server, *found)
    if restarted:
        with running_server(state, upstream=registry) as server:
            check(server, *found)


@pytest_twisted.ensureDeferred
async def test_layers_are_read_while_a_worker_writes_them(tmp_path: Path) -> None:
    content = random.Random(8).randbytes(100_000)
    layers = (Descriptor(DOCKER_LAYER, Digest.of(content), len(content)),)
    clock = Clock()
    with real_threads() as threads:
        for right in (True, False):
            rebuild = Rebuild(
                Evicted(a_row(a_key(1), Digest.of(b"manifest"), 1), layers, "balanced", {}), threads
            )
            file = rebuild.file(layers[0].digest)
            assert file is not None
            device, out = StringTransport(), tmp_path / f"out{right}"
            delivered = file.deliver(device, 0, len(content))
            following = rebuild.follow([out], clock)
            written = 0
            with out.open("wb", buffering=0) as worker:
                while written < len(content):
                    written += worker.write(content[written : written + 30_000])
                    clock.advance(LOOK_EVERY)
                    seen = min(written, len(content) - UNVERIFIED_TAIL)
                    await file.reached(seen - 1)
                    while len(device.value()) < seen:
                        await threads.run(lambda: None)
                    # No client may read the end yet.
                    assert device.value() == content[:seen]
            following.stop()
            assert rebuild.file(Digest.of(b"other")) is None
            if right:
                rebuild.compare([{"digest": str(layers[0].digest), "size": len(content)}])
                rebuild.finished(dict.fromkeys([layers[0].digest], out).get)
                await delivered
                assert device.value() == content
                continue
            with pytest.raises(DigestMismatch) as mismatch:
                rebuild.compare([{"digest": str(Digest.of(b"other")), "size": len(content)}])
            rebuild.failed(mismatch.value)
            with pytest.raises((DigestMismatch, SizeMismatch)):
                await delivered
            assert len(device.value()) == len(content) - UNVERIFIED_TAIL
