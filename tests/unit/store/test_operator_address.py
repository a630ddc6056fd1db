"""The recorded address of the operators' endpoint: of a running server only."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import cast

import pytest
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher

from obdelta.store import operator_address


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("tcp:0", "http://127.0.0.1:{}"),
        ("tcp:0:interface=127.0.0.2", "http://127.0.0.2:{}"),
        ("tcp:0:interface=\\:\\:1", "http://[::1]:{}"),
        ("tcp:0:interface=\\:\\:", "http://[::1]:{}"),
    ],
)
async def test_commands_can_use_the_written_address(
    endpoint: str, address: str, tmp_path: Path
) -> None:
    port = await serverFromString(reactor, endpoint).listen(Factory())
    try:
        remove = operator_address.record(tmp_path, [port])
        assert operator_address.find(tmp_path) == address.format(port.getHost().port)
        remove()
        assert operator_address.find(tmp_path) is None
        assert not list(tmp_path.iterdir())
    finally:
        await port.stopListening()


async def test_a_unix_socket_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    port = await serverFromString(reactor, "unix:operators").listen(Factory())
    try:
        operator_address.record(tmp_path, [port])
        assert operator_address.find(tmp_path) == f"unix:{tmp_path}/operators"
    finally:
        await port.stopListening()


async def test_the_address_of_a_dead_server_is_not_used(tmp_path: Path) -> None:
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(Factory())
    try:
        operator_address.record(tmp_path, [port])
    finally:
        await port.stopListening()
    file = tmp_path / operator_address.NAME
    content = json.loads(file.read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    for stale in (
        {"pid": ended.pid},
        {"started": content["started"] - 1},  # another process has its ID now
        {"started": None, "pid": ended.pid},
        {"pid": "x"},
        {"address": None, "pid": None},
    ):
        file.write_text(json.dumps(content | stale))
        assert operator_address.find(tmp_path) is None, stale
    for text in ("", "[]", "{}", "\udcff"):
        file.write_bytes(os.fsencode(text))
        assert operator_address.find(tmp_path) is None


async def test_a_failed_write_of_the_address_does_not_stop_the_start(
    tmp_path: Path,
) -> None:
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(Factory())
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(cast(ILogObserver, events.append))
    try:
        operator_address.record(tmp_path / "missing", [port])()
        assert operator_address.find(tmp_path / "missing") is None
    finally:
        globalLogPublisher.removeObserver(cast(ILogObserver, events.append))
        await port.stopListening()
    assert any("was not written" in str(event.get("log_format")) for event in events)
