"""Debian's ``docker-registry`` on loopback: the real upstream of benchmarks."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LISTENING = re.compile(rb"listening on (127\.0\.0\.1:[0-9]+)")


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Runs a registry with its data under ``root``, on a free port; yields its URL, and kills it
    at the end.
    """
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(root / "data")},
            "maintenance": {"uploadpurging": {"enabled": False}},
        },
        "http": {"addr": "127.0.0.1:0"},
    }
    config = root / "registry.yml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    with subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            address = _address(process.stderr)
            # Its output is read until its end: a full pipe would stop it.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield f"http://{address}"
        finally:
            process.kill()


def _address(log: IO[bytes]) -> str:
    output = b""
    for line in log:
        output += line
        if found := _LISTENING.search(line):
            return found[1].decode()
    raise RuntimeError(f"docker-registry did not start: {output[-500:].decode('utf-8', 'replace')}")
