"""`make demo` without its downloads: the same proxy, device, table and exit status, over files of
the test's own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest

from bench import demo, images, rsync_device
from bench.images import Entry
from obdelta.device import Device, Http


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo in a folder of its own, with a part of the standard library and no wheels from
    elsewhere.
    """

    def wheels(bumps: tuple[demo.Bump, ...], is_new: bool, scratch: Path) -> list[Entry]:
        code = Path(demo.__file__).read_bytes() * 4
        name = bumps[0].name
        changed = bumps[0].old != bumps[0].new and is_new
        return [
            images.file(
                f"site-packages/{name}.py", code.replace(b"delta", b"Delta", 9) if changed else code
            )
        ]

    whole = demo.standard_library()
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo, "wheels", wheels)
    monkeypatch.setattr(
        demo, "standard_library", lambda: [entry for entry in whole if "/json" in entry.info.name]
    )
    monkeypatch.delenv("KEEP", raising=False)
    return tmp_path / "demo"


def test_it_shows_a_verified_update_and_leaves_nothing(
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


def test_keep_leaves_a_proxy_that_can_be_asked(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEP", "1")
    assert demo.main() == 0
    shown = capsys.readouterr().out
    found = re.search(r"process (\d+)", shown)
    assert found is not None
    try:
        asked = re.search(r"curl '(\S+)'", shown)
        assert asked is not None
        with Http().ask("GET", asked[1]) as answer:
            assert answer.status == 200
            assert b":delta-" in answer.small(1000)
        assert re.search(r"obdelta check \S+ \S+ --server http", shown)
    finally:
        os.kill(int(found[1]), signal.SIGKILL)
        os.waitpid(int(found[1]), 0)
    assert len(list(small.glob("run-*"))) == 1


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
