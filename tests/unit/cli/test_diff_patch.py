"""`obdelta diff` and `obdelta patch` as a user runs them, and combined with Debian's rdiff."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from obdelta.oci import DiffID
from tests.support.commands import CLEARED, OBDELTA, environment, error_of, on_terminal, run
from tests.support.images import make_layers

MAGIC = bytes.fromhex("72730236")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tars")
    base, target = make_layers(folder / "blobs", size=512 * 1024)
    return base[2].write_tar(folder / "base.tar"), target[2].write_tar(folder / "target.tar")


def test_diff_and_patch(tars: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = tars
    run("diff", base, target, "-o", tmp_path / "delta")
    delta = (tmp_path / "delta").read_bytes()
    assert delta.startswith(MAGIC)
    assert len(delta) < target.stat().st_size / 2
    run("patch", base, tmp_path / "delta", "-o", tmp_path / "made")
    assert (tmp_path / "made").read_bytes() == target.read_bytes()


def test_rdiff_and_obdelta_read_each_others_streams(
    tars: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = tars
    ours, rdiff_delta, signature = tmp_path / "ours", tmp_path / "theirs", tmp_path / "signature"
    run("diff", base, target, "-o", ours)
    subprocess.run(["rdiff", "patch", base, ours, tmp_path / "by-rdiff"], check=True)
    assert (tmp_path / "by-rdiff").read_bytes() == target.read_bytes()
    subprocess.run(["rdiff", "-b", "512", "-S", "32", "signature", base, signature], check=True)
    subprocess.run(["rdiff", "delta", signature, target, rdiff_delta], check=True)
    run("patch", base, rdiff_delta, "-o", tmp_path / "by-us")
    assert (tmp_path / "by-us").read_bytes() == target.read_bytes()
    assert ours.stat().st_size <= rdiff_delta.stat().st_size


def test_json_and_the_stream_do_not_share_stdout(tars: tuple[Path, Path]) -> None:
    base, target = tars
    for command in (["diff", base, target], ["patch", base, "-"]):
        ran = run(*command, "-o", "-", "--json", status=2)
        assert ran.stdout == b""
        assert "give a file" in json.loads(ran.stderr)["error"]["message"]


def test_a_progress_bar_is_drawn_on_a_terminal(tars: tuple[Path, Path], tmp_path: Path) -> None:
    shown = on_terminal("diff", *tars, "-o", tmp_path / "delta")
    assert b"reading" in shown and b" 100% match" in shown
    assert shown.endswith(CLEARED)


def test_streams_pass_through_standard_input_and_output(tars: tuple[Path, Path]) -> None:
    base, target = tars
    delta = run("diff", base, target, "-o", "-").stdout
    assert delta.startswith(MAGIC)
    assert run("patch", base, "-", "-o", "-", stdin=delta).stdout == target.read_bytes()


@pytest.mark.parametrize("effort", ["fast", "balanced", "small"])
def test_every_effort_gives_the_target(
    tars: tuple[Path, Path], tmp_path: Path, effort: str
) -> None:
    base, target = tars
    delta, made = tmp_path / "delta", tmp_path / "made"
    output = json.loads(run("diff", base, target, "-o", delta, "--effort", effort, "--json").stdout)
    size, diff_id = target.stat().st_size, str(DiffID.of(target.read_bytes()))
    assert (output["file"], output["target"], output["tar_bytes"]) == (str(delta), diff_id, size)
    assert output["literal_bytes"] + output["copied_bytes"] == size
    assert output["compressed_bytes"] < output["bytes"] == delta.stat().st_size
    patched = json.loads(run("patch", base, delta, "-o", made, "--json").stdout)
    assert patched == {"file": str(made), "bytes": size, "target": diff_id}
    assert made.read_bytes() == target.read_bytes()


def test_a_faster_link_gives_fewer_copies(tars: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = tars
    found = []
    for speed in ("metered", "0.5 Mbit/s", "100 Mbit/s"):
        options = ["-o", tmp_path / "delta", "--device-link", speed, "--json"]
        report = json.loads(run("diff", base, target, *options).stdout)
        found.append((report["compressed_bytes"], -report["copies"]))
    assert found[0] < found[-1]
    assert [copies for _, copies in found] == sorted(copies for _, copies in found)
    run("diff", base, target, "-o", "-", "--device-link", "fast", status=2)


def test_a_broken_stream_leaves_no_file_and_keeps_an_old_one(
    tars: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = tars
    delta = run("diff", base, target, "-o", "-").stdout
    (tmp_path / "out").write_bytes(b"old")
    for broken in (delta[:-1], delta[: len(delta) // 2], b"", b"nonsense", delta + b"more"):
        ran = run("patch", base, "-", "-o", tmp_path / "out", stdin=broken, status=1)
        assert "delta stream is invalid at byte" in error_of(ran)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out").read_bytes() == b"old"


def test_a_copy_from_behind_the_base_is_refused(tars: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = tars
    delta = run("diff", base, target, "-o", "-").stdout
    short = tmp_path / "short"
    short.write_bytes(base.read_bytes()[:512])
    assert "delta stream is invalid" in error_of(
        run("patch", short, "-", "-o", "-", stdin=delta, status=1)
    )


def test_missing_files_are_reported(tars: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = tars
    none = tmp_path / "none"
    assert (
        error_of(run("diff", base, none, "-o", tmp_path / "x", status=1))
        == f"obdelta: {none}: No such file or directory"
    )
    assert error_of(run("patch", none, base, "-o", tmp_path / "x", status=1)).endswith(
        "No such file or directory"
    )
    assert "No such file" in error_of(run("diff", base, base, "-o", none / "x", status=1))
    assert not list(tmp_path.iterdir())


def test_output_has_the_modes_that_the_umask_leaves(
    tars: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = tars
    run("diff", base, target, "-o", tmp_path / "delta")
    (tmp_path / "usual").touch()
    assert (tmp_path / "delta").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pipes_devices_and_links_are_not_replaced_by_files(
    tars: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = tars
    run("diff", base, target, "-o", tmp_path / "delta")
    (tmp_path / "link").symlink_to("file")
    run("diff", base, target, "-o", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "delta").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        run("patch", base, tmp_path / "delta", "-o", tmp_path / "pipe")
        assert reader.communicate(timeout=60)[0] == target.read_bytes()
    assert (tmp_path / "pipe").is_fifo()
    device = tmp_path / "full"  # as /dev/full, which no user wants to lose
    device.symlink_to("/dev/full")
    assert "No space left" in error_of(run("diff", base, target, "-o", device, status=1))
    assert Path("/dev/full").is_char_device()
    assert "Is a directory" in error_of(run("diff", base, target, "-o", tmp_path, status=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "delta",
        "file",
        "full",
        "link",
        "pipe",
    ]


def test_a_reader_that_closes_the_pipe_early_is_no_error(tars: tuple[Path, Path]) -> None:
    base, target = tars
    command = [*OBDELTA, "diff", str(base), str(target), "-o", "-"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)  # 0 if all of it fitted into the pipe


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["diff"], ["diff", "a", "b"], ["patch", "a", "b", "--effort", "x"]],
)
def test_wrong_usage_is_reported(arguments: list[str]) -> None:
    assert "(see: obdelta" in error_of(run(*arguments, status=2))


def test_help_names_exit_statuses() -> None:
    assert b"exit status:\n  0  success" in run("help", "status").stdout


def test_version_is_printed() -> None:
    assert run("--version").stdout.startswith(b"obdelta ")
