"""`make demo` without its downloads: the same proxy, device, table and exit status, with files of
the test.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from bench import demo, demo_images, images, rsync_device
from bench.images import Entry
from obdelta.device.http import Http, ServerFault
from obdelta.device.update import Device
from obdelta.oci import Reference


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the demo in a separate directory, with a part of the standard library and without
    downloaded wheels.
    """

    def wheels(
        bumps: tuple[demo_images.Bump, ...], is_new: bool, downloads: Path, scratch: Path
    ) -> list[Entry]:
        code = Path(demo.__file__).read_bytes() * 4
        name = bumps[0].name
        changed = bumps[0].old != bumps[0].new and is_new
        return [
            images.file(
                f"site-packages/{name}.py", code.replace(b"delta", b"Delta", 9) if changed else code
            )
        ]

    whole = demo_images.standard_library()
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo_images, "wheels", wheels)
    library = [entry for entry in whole if "/json" in entry.info.name]
    monkeypatch.setattr(demo_images, "standard_library", lambda: library)
    monkeypatch.delenv("KEEP", raising=False)
    return tmp_path / "demo"


def test_the_demo_shows_a_verified_update_and_leaves_nothing(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main() == 0
    shown = capsys.readouterr().out
    figures = r" +([\d,]+) +([\d,]+) +([\d.]+)% +[\d.]+ +[\d.]+ +[\d.]+  verified$"
    for kind in ("v3", "v2"):
        (row,) = re.findall(f"^{kind}{figures}", shown, re.MULTILINE)
        full, delta = (int(figure.replace(",", "")) for figure in row[:2])
        assert delta < full / 2
        assert float(row[2]) == pytest.approx(100 * (1 - delta / full), abs=0.06)
    assert "5 layers" in shown
    assert not list(small.glob("run-*"))


def test_keep_leaves_a_server_and_commands_that_work_as_printed(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEP", "1")
    monkeypatch.chdir(demo.ROOT)
    assert demo.main() == 0
    shown = capsys.readouterr().out
    found = re.search(r"process (\d+)", shown)
    assert found is not None
    (run,) = small.glob("run-*")
    try:
        page = re.search(r"^  (http://127\.0\.0\.1:\d+/)$", shown, re.MULTILINE)
        assert page is not None
        with Http().request("GET", page[1]) as answer:
            assert b"<title>" in answer.small(1 << 20)
        lines = shown.partition("The server goes on")[2].splitlines()
        commands = [line.strip() for line in lines if re.match("  [^h]", line)]
        outputs = [
            subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            for command in commands[:-1]
        ]
        assert [ran.returncode for ran in outputs] == [0, 0, 0, 0], outputs
        status, explained, requested, checked = (ran.stdout for ran in outputs)
        assert "state    ready" in status
        assert "collect.py" in explained or "json" in explained
        assert ":delta-" in requested
        assert checked.startswith("verified: delta ")
        assert commands[-1] == "make demo-stop"
        assert not list(run.glob("*device*"))
    finally:
        assert demo.stop() == 0
        os.waitpid(int(found[1]), 0)
    assert not small.exists()
    assert demo.server_of(run) is None
    assert demo.stop() == 0
    assert "there is no demo to stop" in capsys.readouterr().out


def test_stop_ends_no_other_process(small: Path) -> None:
    """The ID that a demo recorded may belong to another process by now."""
    run = small / "run-x"
    run.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        (run / demo.PID).write_text(str(other.pid))
        assert demo.stop() == 0
        assert other.poll() is None
        other.kill()
    assert not small.exists()


def test_a_demo_ended_by_sigterm_leaves_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = []

    def end(server: str, *rest: object) -> None:
        servers.append(server)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(demo, "be_a_device", end)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(SystemExit) as ended:
            demo.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not list(small.glob("run-*"))
    with pytest.raises(ServerFault), Http().request("GET", f"{servers[0]}/v2/"):
        pass


def test_an_update_that_is_not_verified_fails(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Device.ask

    def ask_for_another(self: Device, base: str, target: str, deadline: float) -> object:
        return ask(self, target, base, deadline)

    monkeypatch.setattr(Device, "ask", ask_for_another)
    assert demo.main() == 1
    shown = capsys.readouterr()
    assert "verified" not in shown.out
    assert shown.err.startswith("demo failed: label io.resin.delta.base has digest")
    assert not list(small.glob("run-*"))


def test_keep_leaves_nothing_where_the_answer_is_a_full_pull(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = []

    def full_pull(self: Device, base: str, target: str, deadline: float) -> tuple[Reference, int]:
        servers.append(self.server)
        return Reference.parse(target), 1

    monkeypatch.setenv("KEEP", "1")
    monkeypatch.setattr(Device, "ask", full_pull)
    assert demo.main() == 1
    assert "answered with a full pull" in capsys.readouterr().err
    assert not list(small.glob("run-*"))
    with pytest.raises(ServerFault), Http().request("GET", f"{servers[0]}/v2/"):
        pass


def test_a_v2_update_that_is_not_verified_fails(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = rsync_device.root_filesystem

    def without_the_last_layer(image: images.Image, out: Path) -> Path:
        wrong = out.name == "target"
        return unpack(dataclasses.replace(image, layers=image.layers[:-1]) if wrong else image, out)

    monkeypatch.setattr(rsync_device, "root_filesystem", without_the_last_layer)
    assert demo.main() == 1
    shown = capsys.readouterr()
    assert "verified" not in shown.out
    assert shown.err.startswith("demo failed: delta for the target failed its proof")
    assert not list(small.glob("run-*"))


def test_a_proxy_that_does_not_come_up_fails_with_its_log(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "HOST", "no/host")
    assert demo.main() == 1
    assert "setting registry-hosts has the value 'no/host'" in capsys.readouterr().err
