"""Runs `obdelta doctor` in this process, on a settings file of a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdelta.cli.main import main
from tests.support.tokens import make_certificate, make_key, private_pem

Output = pytest.CaptureFixture[str]


def write(folder: Path, **settings: str) -> Path:
    """Writes a valid settings file with these settings."""
    right = {
        "upstream": f"oci:{folder}",
        "public-url": "http://127.0.0.1:8080",
        "listen": "tcp:8080:interface=127.0.0.1",
        "state-dir": str(folder / "state"),
        "store-quota": "1 MiB",
        "auth": "none",
    }
    given = {key.replace("_", "-"): value for key, value in settings.items()}
    lines = [f"{key} = {value}" for key, value in (right | given).items() if value]
    file = folder / "tap.conf"
    file.write_text("\n".join(["[obdelta]", *lines, ""]))
    return file


def doctor(file: Path, output: Output) -> dict[str, list[str]]:
    status = main(["doctor", "-c", str(file), "--json"])
    found: dict[str, list[str]] = json.loads(output.readouterr().out)
    assert status == (2 if found["errors"] else 3 if found["warnings"] else 0)
    return found


def warning_of(file: Path, output: Output) -> str:
    found = doctor(file, output)
    assert found["errors"] == []
    (line,) = found["warnings"]
    return line


def certificate(folder: Path, name: str, days: int = 90) -> Path:
    key = make_key("ES256")
    file = folder / "tls.pem"
    file.touch(0o640)
    file.write_bytes(make_certificate(key, name, days=days) + private_pem(key))
    return file
