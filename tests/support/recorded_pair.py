"""A pair of images for a recorder, and an rsync of the test."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet import reactor as installed
from twisted.internet.task import deferLater

from obdelta.concurrency.reactor import IReactor
from obdelta.rsync.recorder_process import RecordingJob
from tests.support import rootfs
from tests.unit.rootfs.test_engine import layers_with_everything

reactor = cast(IReactor, installed)


class Pair:
    """Two trees, and a job to make the stream between them."""

    def __init__(self, directory: Path) -> None:
        layers = [[rootfs.file("a", b"1" * 100_000), rootfs.file("b", b"2")]]
        self.directory = directory
        self.base = rootfs.tree(rootfs.image(layers, directory / "1"), directory / "base")
        self.target = rootfs.tree(
            rootfs.image(layers_with_everything(), directory / "2"), directory / "target"
        )

    def order(self, **changes: Any) -> RecordingJob:
        order = RecordingJob(
            self.base,
            self.target,
            {"Cmd": ["x"]},
            self.directory / "stream",
            self.directory / "scratch",
        )
        return order._replace(**changes)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def rsync_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields a directory that comes first in PATH, for an ``rsync`` of the test."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    yield directory


def install(directory: Path, script: str) -> None:
    path = directory / "rsync"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def until(happened: Any, seconds: float = 60.0) -> None:
    """Waits for an event outside the reactor."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        await deferLater(reactor, 0.02)
