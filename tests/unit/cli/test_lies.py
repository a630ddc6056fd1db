"""Broken and hostile answers of a server: every command reports them in one line, and none of them
controls the terminal.
"""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from obdelta.cli.main import main

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\n<script>" + "x" * 300
DIGEST = "sha256:" + "0" * 64
IMAGE = {"repository": EVIL, "digest": DIGEST}
COUNTS = {"literal_bytes": 1, "copied_bytes": 1, "copies": 1, "small_copies": 1, "wire_bytes": 1}
LAYER: dict[str, Any] = {
    **COUNTS,
    "number": 1,
    "diff_id": DIGEST,
    "size": 1,
    "entries": 1,
    "changed": 1,
    "files": [],
    "rest": None,
}
SIZES = {"full_bytes": 1, "delta_bytes": 1}
REPORT = {
    **SIZES,
    **COUNTS,
    "disk_bytes": 1,
    "shared_layers": 1,
    "layers": [LAYER],
    "files": [{**COUNTS, "layer": 1, "name": EVIL, "size": 1}],
}
BATCH = {
    **SIZES,
    "head": 1,
    "files": 1,
    "size": 1,
    "wire_bytes": 1,
    "copied_bytes": 1,
    "copies": 1,
    "top": [{"size": 1, "wire_bytes": 1, "copied_bytes": 1, "copies": 1, "name": EVIL}],
}
ROW = {
    **SIZES,
    "kind": EVIL,
    "recipe": 1,
    "base": IMAGE,
    "target": IMAGE,
    "tag": "latest",
    "content": DIGEST,
    "seconds": 1,
    "created": 1,
    "last_served": 1,
    "served": 1,
}
FAILURE = {
    "kind": EVIL,
    "form": EVIL,
    "base": IMAGE,
    "target": IMAGE,
    "outcome": EVIL,
    "reason": EVIL,
    "advice": EVIL,
    "count": 1,
    "last": 1,
}
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "config": {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "size": 2,
        "digest": DIGEST,
    },
    "layers": [],
}
JOB = {
    **SIZES,
    "id": EVIL,
    "kind": EVIL,
    "src": EVIL,
    "dest": EVIL,
    "state": "ready",
    "reason": EVIL,
    "name": EVIL,
    "ratio": 1.0,
    "seconds": 1,
    "progress": {},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "/api/v1/status": {
        "version": EVIL,
        "now": 1,
        "problems": {EVIL: EVIL},
        "notes": [EVIL],
        "devices": 1,
        "builds": {"running": 1, "queued": 1},
        "served": {"deltas": 1, **SIZES},
        "kept": {"deltas": 1, "usage": {EVIL: 1}, "quota": 1},
        "deltas": [ROW],
        "failures": [FAILURE],
    },
    "/api/v1/builds": {
        "builds": [
            {
                "pair": EVIL,
                "state": EVIL,
                "seconds": 1,
                "waiting": 1,
                "progress": {"stage": EVIL, "layer": 0, "layers": 1, "done": 1, "of": 2},
            }
        ]
    },
    "/api/v1/gc": {"freed": 1, "usage": {EVIL: 1}, "quota": 1, "over": 0},
    "/api/v1/prune": {
        "applied": True,
        "freed": 1,
        "problem": EVIL,
        "problems": [{"repository": EVIL, "reason": EVIL}],
        "store": [{"id": EVIL, "src": EVIL, "dest": EVIL, "bytes": 1, "reason": EVIL}],
        "registry": [{"repository": EVIL, "digest": EVIL, "tags": [EVIL], "reason": EVIL}],
        "kept": {EVIL: 1},
    },
    "/api/v1/prepare": {"id": EVIL, "done": True, "jobs": [JOB]},
    "/api/v1/deltas": {
        "delta": ROW,
        "report": REPORT,
        "manifest": {"media_type": MANIFEST["mediaType"], "raw": json.dumps(MANIFEST)},
    },
}
PAIR = ["r.example.com/a/b", "r.example.com/a/c"]
COMMANDS = [
    ["status"],
    ["builds"],
    ["gc"],
    ["prune"],
    ["prepare", *PAIR],
    ["prepare", *PAIR, "--no-wait"],
    ["explain", *PAIR],
    ["explain", *PAIR, "--kind", "v2"],
    ["export", *PAIR, "-o", "OUT"],
]
SEEDS = 20


class Liar:
    """A double of a server, because no real one answers so. ``chance`` spoils the answers; None:
    they are well-formed.
    """

    def __init__(self) -> None:
        self.chance: random.Random | None = None
        liar = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                status, value = liar.answer(self.path)
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Logs nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str) -> tuple[int, Any]:
        value: Any = ANSWERS.get(path.partition("?")[0], {})
        if "kind=v2" in path:
            value = value | {"report": BATCH}
        if self.chance is None:
            return 200, value
        if self.chance.random() < 0.1:
            return 500, {"error": {"message": EVIL}}
        return 200, self.spoiled(value)

    def spoiled(self, value: Any) -> Any:
        chance = self.chance
        assert chance is not None
        if chance.random() < 0.1:
            return chance.choice([None, -1, 1e308, EVIL, [], {}, [1], {"a": 1}, True, 10**400])
        if isinstance(value, dict):
            return {
                key: self.spoiled(inner) for key, inner in value.items() if chance.random() > 0.04
            }
        return [self.spoiled(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture
def liar() -> Iterator[Liar]:
    made = Liar()
    threading.Thread(
        target=made.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)  # the command's own output otherwise
    made.server.shutdown()
    made.server.server_close()


def test_no_answer_causes_a_traceback_or_controls_the_terminal(
    liar: Liar, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = set()
    for seed in [None, *range(SEEDS)]:
        for command in COMMANDS:
            liar.chance = None if seed is None else random.Random(f"{seed} {command}")
            arguments = [
                str(tmp_path / "out") if argument == "OUT" else argument for argument in command
            ]
            seen.add(status := main([*arguments, "--operator", liar.url]))
            captured = capsys.readouterr()
            assert not {
                char
                for char in captured.out + captured.err
                if char != "\n" and not char.isprintable()
            }, (
                seed,
                command,
            )
            assert status in (0, 1, 3)
            if status == 1 and not captured.out:
                assert captured.err.startswith("obdelta: ") and captured.err.count("\n") == 1, (
                    seed,
                    command,
                )
    assert seen == {0, 1, 3}
    assert not list(tmp_path.iterdir())
