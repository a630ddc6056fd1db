"""`obdelta serve`, and the commands that find the server by its state-dir."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from obdelta.web.operators.passwords import make_line
from tests.support.commands import OBDELTA, environment, run
from tests.support.processes import until
from tests.support.server import RunningServer, free_port, running_server


def write(file: Path, state: Path, *lines: str) -> Path:
    file.write_text("\n".join(["[obdelta]", f"state-dir = {state}", *lines, ""]))
    return file


def test_commands_find_the_server_by_its_state_dir(tmp_path: Path) -> None:
    """The server listens on another port than operator-listen says; after a kill the setting
    applies again.
    """
    state = tmp_path / "state"
    file = write(tmp_path / "tap.conf", state)
    with running_server(
        state, upstream=f"oci:{tmp_path}", run=lambda *given: [*OBDELTA, "serve", *given]
    ) as server:
        assert isinstance(server, RunningServer)
        shown = json.loads(run("status", "--json", cwd=tmp_path).stdout)
        assert shown["problems"] == {}
        assert server.operator_url in (state / "operator-address").read_text()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert (state / "operator-address").exists()
        ran = run("status", "-c", file, status=1)
        assert b"http://127.0.0.1:9100 cannot be reached" in ran.stderr


def test_an_orderly_stop_removes_the_address(tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=f"oci:{tmp_path}"):
        assert (tmp_path / "state/operator-address").exists()
    assert not (tmp_path / "state/operator-address").exists()


def test_reload_reports_which_settings_took_effect(tmp_path: Path) -> None:
    state, login = tmp_path / "state", tmp_path / "login"
    login.write_text("alice:secret")
    passwords = tmp_path / "operators"
    passwords.write_text(make_line("alice", "secret") + "\n")
    file = write(tmp_path / "tap.conf", state, "log-level = info", "request-timeout = 45")
    with running_server(
        state,
        upstream=f"oci:{tmp_path}",
        run=lambda *options: [*OBDELTA, "serve", f"--config={file}", *options],
        operator_passwords=str(passwords),
    ) as server:
        assert run("reload", "-c", file).stdout == b"nothing has changed\n"
        write(file, state, "log-level = debug", "request-timeout = 46")
        shown = run("reload", "-c", file, status=3).stdout.decode()
        assert shown == "taken: log-level = debug\nneeds a restart: request-timeout = 46\n"
        answer = json.loads(run("reload", "--json", "-c", file, status=3).stdout)
        assert answer == {"taken": [], "restart": ["request-timeout = 46"], "problems": []}
        write(file, state, "log-level = loud", "efort = small")
        operator = ("--operator", server.operator_url, "--login", f"@{login}")
        shown = run("reload", *operator, status=1).stdout.decode()
        assert "unusable: setting log-level has the value 'loud': expected" in shown
        assert f"(from {file}:3)" in shown
        assert "unusable: setting efort has the value 'small'" in shown


def test_serve_ends_with_the_status_of_twistd(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM stop it in order; unusable settings give status 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        state = tmp_path / f"state-{number}"
        options = [
            f"--upstream=oci:{tmp_path}",
            "--public-url=http://127.0.0.1",
            "--auth=none",
            f"--state-dir={state}",
            f"--listen=tcp:{free_port()}:interface=127.0.0.1",
            f"--operator-listen=tcp:{free_port()}:interface=127.0.0.1",
        ]
        with subprocess.Popen(
            [*OBDELTA, "serve", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment(),
        ) as process:
            until("it listens", (state / "operator-address").exists)
            process.send_signal(number)
            log, _ = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGINT else 0), log
        assert b"Traceback" not in log
        assert not (state / "operator-address").exists()
    ran = run("serve", "--upstream", "x", status=2, cwd=tmp_path)
    assert ran.stderr.startswith(b"obdelta: setting upstream has the value 'x'")
