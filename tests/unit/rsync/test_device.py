"""v2 streams made without root's rights, applied by the code of devices to images of a real
engine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.images import Entry
from obdelta.oci import parse_config
from obdelta.rootfs.compare import differences
from obdelta.rsync import batch, remote_shell
from obdelta.rsync.docker_config import docker_config
from obdelta.rsync.no_op_padding import Padding
from tests.support import rootfs
from tests.support.dockerd import RunningDockerd, dockerd
from tests.support.unprivileged import make_stream, nobodys_directory
from tests.unit.rootfs.test_engine import layers_with_everything, unlike

__all__ = ["dockerd"]

NODE = Path(__file__).parents[2] / "node"
CONFIG = {
    "config": {
        "Cmd": ["/bin/tool"],
        "Env": ["A=ä<&>"],
        "ExposedPorts": {"80/tcp": {}},
        "Labels": {"a": "b"},
    }
}


@pytest.fixture
def nobodys() -> Iterator[Path]:
    with nobodys_directory() as path:
        yield path


def layers_before() -> list[list[Entry]]:
    """Returns an older release than ``layers_with_everything``: its first layers, and one above
    that differs all over.
    """
    return [
        *layers_with_everything()[:2],
        [
            rootfs.file("bin/tool", b"other tool", mode=0o755, owner=(1, 1)),
            rootfs.hardlink("bin/tool-old", "bin/tool", mode=0o755, owner=(1, 1)),
            rootfs.directory("gone"),
            rootfs.symlink("gone/link", "elsewhere"),
            rootfs.file("gone/file", b"x" * 100_000),
            rootfs.fifo("gone/fifo"),
            rootfs.symlink("dev/pipe", "null"),
            rootfs.file("sbin", b"a file for now"),
            rootfs.file("holes", b"no holes yet"),
            rootfs.directory("exact"),
            rootfs.file("exact/in", b"y"),
            rootfs.whiteout("huge-owner"),
            rootfs.file("usr/lib/real", b"8", mode=0o600, owner=(3, 4)),
        ],
    ]


def apply(engine: RunningDockerd, version: str, source: str, stream: Path) -> dict[str, Any]:
    """Returns docker-delta's result: ``{"id": …}`` or ``{"error": …, "outOfSync": …}``."""
    ran = subprocess.run(
        ["node", NODE / "v2_apply.js", version, source, stream],
        env={**os.environ, "DOCKER_HOST": engine.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout, ran.stderr
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("length", [None, 2_000_000], ids=["as it is", "filled up"])
def test_devices_get_the_target(
    dockerd: RunningDockerd, tmp_path: Path, nobodys: Path, length: int | None
) -> None:
    since = time.time()
    base = rootfs.image(layers_before(), tmp_path / "base")
    target = rootfs.image(layers_with_everything(), tmp_path / "target", config=CONFIG)
    base_id, target_id = dockerd.load(base), dockerd.load(target)
    reports = make_stream(
        base, target, nobodys, docker_config=docker_config(parse_config(target.config))
    )
    assert "proven" in reports[-1], reports[-1]
    if length is not None:
        (recorded,) = (one["recorded"] for one in reports if "recorded" in one)
        fill(nobodys / "stream", recorded["tail"], length)
    for version in ("2", "4"):
        applied = apply(dockerd, version, base_id, nobodys / "stream")
        assert "id" in applied, applied
        with dockerd.mounted(applied["id"]) as result:
            assert unlike(nobodys / "target/root", result, since) == []
        shown = dockerd.inspect(applied["id"])["Config"]
        assert {**shown, "Image": ""} == dockerd.inspect(target_id)["Config"]


def fill(stream: Path, tail: int, length: int) -> None:
    plain = stream.read_bytes()
    extra = length - len(plain)
    stream.write_bytes(plain[:-tail] + Padding(extra).read(0, extra) + plain[-tail:])
    assert stream.stat().st_size == length


def rsyncs() -> list[Path]:
    """Returns the installed rsync, and the oldest that Debian has (``tools/older-rsync`` unpacks
    it if there is another).
    """
    older = Path(__file__).parents[3] / ".cache/older-rsync/usr/bin/rsync"
    return [Path("/usr/bin/rsync"), *([older] if older.exists() else [])]


def version(rsync: Path) -> tuple[int, ...]:
    shown = subprocess.run([rsync, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version v?([0-9.]+)", shown)
    assert found is not None
    return tuple(map(int, found[1].split(".")))


@pytest.mark.parametrize("rsync", rsyncs(), ids=lambda path: ".".join(map(str, version(path))))
def test_older_readers_get_the_target(rsync: Path, tmp_path: Path, nobodys: Path) -> None:
    """Read as root and without --fake-super, as on a device. Without an older rsync, the header
    alone must show it.
    """
    base = rootfs.image(layers_before(), tmp_path / "base")
    target = rootfs.image(layers_with_everything(), tmp_path / "target")
    (recorded,) = (
        one["recorded"] for one in make_stream(base, target, nobodys) if "recorded" in one
    )
    fill(nobodys / "stream", recorded["tail"], 300_000)
    stream = (nobodys / "stream").read_bytes().partition(b"\0")[2]
    assert batch.Header.decode(stream)[0] == batch.Header(0x1FF, 31, 0x0E, 1)
    assert stream[8] == 0x0E
    device = restored(nobodys / "base/root", tmp_path / "device")
    subprocess.run(
        [rsync, "--archive", "--delete", "--read-batch", "-", f"{device}/"],
        input=stream,
        check=True,
    )
    assert list(differences(nobodys / "target/root", device, expected_fake=False)) == []


def test_a_base_with_nothing_in_common(
    dockerd: RunningDockerd, tmp_path: Path, nobodys: Path
) -> None:
    since = time.time()
    base = rootfs.image([[rootfs.file("only", b"1")]], tmp_path / "base")
    target = rootfs.image(layers_with_everything(), tmp_path / "target")
    base_id = dockerd.load(base)
    assert "proven" in make_stream(base, target, nobodys)[-1]
    applied = apply(dockerd, "2", base_id, nobodys / "stream")
    with dockerd.mounted(applied["id"]) as result:
        assert unlike(nobodys / "target/root", result, since) == []


@pytest.mark.parametrize("version", ["2", "4"])
@pytest.mark.parametrize("config", [None, {"Cmd": ["x"]}], ids=["no config", "config"])
def test_the_out_of_sync_answer_is_out_of_sync_to_devices(
    dockerd: RunningDockerd, tmp_path: Path, version: str, config: dict[str, Any] | None
) -> None:
    base_id = dockerd.load(rootfs.image([[rootfs.file("only", b"1")]], tmp_path))
    before = dockerd.command("images", "--all", "--quiet")
    stream = tmp_path / "stream"
    stream.write_bytes(batch.out_of_sync(config))
    applied = apply(dockerd, version, base_id, stream)
    assert applied["outOfSync"] is True, applied
    with dockerd.mounted(base_id) as root:
        assert (root / "only").read_bytes() == b"1"
    # The helper ends at the error; docker-delta would remove the image that it had begun.
    for left in set(dockerd.command("images", "--all", "--quiet").split()) - set(before.split()):
        dockerd.command("rmi", left)


def test_a_wrong_base_is_out_of_sync_or_wrong_for_all(
    dockerd: RunningDockerd, tmp_path: Path, nobodys: Path
) -> None:
    """The reason for the proof: rsync exits with 23 only if a file is missing."""
    base = rootfs.image(
        [[rootfs.file("kept", b"1" * 5000), rootfs.file("changed", b"2")]], tmp_path / "base"
    )
    target = rootfs.image(
        [[rootfs.file("kept", b"1" * 5000), rootfs.file("changed", b"3")]], tmp_path / "target"
    )
    other = rootfs.image([[rootfs.file("changed", b"2")]], tmp_path / "other")
    make_stream(base, target, nobodys)
    applied = apply(dockerd, "2", dockerd.load(other), nobodys / "stream")
    assert applied["outOfSync"] is True, applied


def test_the_batch_is_identical_to_that_of_root(tmp_path: Path, nobodys: Path) -> None:
    """The batches are equal byte for byte (on a file system whose listings do not follow the order
    of creation, such as ext4).
    """
    base = rootfs.image(layers_before(), tmp_path / "base")
    target = rootfs.image(layers_with_everything(), tmp_path / "target")
    assert "proven" in make_stream(base, target, nobodys)[-1]
    for name in ("base", "target"):
        real = restored(nobodys / name / "root", tmp_path / f"real-{name}")
        assert (real / "sbin").is_symlink() == (name == "target")
    recording = batch.Recording()
    root = reference(tmp_path / "real-base", tmp_path / "real-target", tmp_path / "batch")
    expected = batch.stream_header(None) + recording.feed(root) + recording.finish()
    assert (nobodys / "stream").read_bytes() == expected


def restored(tree: Path, out: Path) -> Path:
    """Returns the tree as root would have it, restored by rsync's own reading of the attributes."""
    far = f'"{sys.executable}" "{remote_shell.__file__}"'
    options = [
        "--archive",
        "--hard-links",
        "--numeric-ids",
        "--remote-option=--fake-super",
        f"--rsh={far}",
    ]
    environment = {**os.environ, remote_shell.BASE: f"{tree}/"}
    subprocess.run(["rsync", *options, "base:/", f"{out}/"], env=environment, check=True)
    return out


def reference(base: Path, target: Path, out: Path) -> bytes:
    """Runs the reference's arguments, with the protocol that devices read and without names, as
    root on real trees.
    """
    command = batch.record_command(out, target, (sys.executable, remote_shell.__file__))
    command = [one for one in command if "fake-super" not in one]
    subprocess.run(command, env={**os.environ, remote_shell.BASE: f"{base}/"}, check=True)
    return out.read_bytes()


def test_no_names_of_this_machine(tmp_path: Path, nobodys: Path) -> None:
    """The owners 33 and 8 have names on Debian; the device would map those to its own numbers."""
    base = rootfs.image([[rootfs.file("x", b"1")]], tmp_path / "base")
    target = rootfs.image([[rootfs.file("x", b"2", owner=(33, 8))]], tmp_path / "target")
    assert "proven" in make_stream(base, target, nobodys)[-1]
    assert Path("/etc/passwd").read_text().find("www-data:x:33:") >= 0
    stream = (nobodys / "stream").read_bytes()
    assert b"www-data" not in stream and b"mail" not in stream
