"""The server that the benchmarks measure."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from bench import served
from bench.registry import serving


def test_the_measured_server_starts_with_its_settings(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "registry") as registry,
        served.running(registry, tmp_path / "state", "small") as (address, _),
        urllib.request.urlopen(f"http://{address}/v2/", timeout=60) as answer,
    ):
        assert answer.status == 200
