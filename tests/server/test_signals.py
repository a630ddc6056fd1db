"""Signals: SIGHUP reloads everything that can be reloaded, in every process; no signal ends the
server without a drain.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.behind_haproxy import HOST, Device, Keys
from tests.support.processes import connection_to, further, serving, until
from tests.support.server import STOP_SECONDS, RunningServer, command, free_port, running_server
from tests.support.tokens import AUDIENCE, Issuer, pulls

MEANINGLESS = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO")


def configured(file: Path, *lines: str) -> str:
    file.write_text("\n".join(["[obdelta]", *lines, ""]))
    return str(file)


def hang_up(server: RunningServer, times: int = 1) -> None:
    server.process.send_signal(signal.SIGHUP)
    until("it was read again", lambda: server.log.count("reload: done") == times)


def with_config(file: Path) -> Any:
    return lambda *options: command(f"--config={file}", *options)


def test_a_reload_changes_log_levels_and_names_settings_that_need_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "tap.conf"
    configured(file, "log-level = error", "request-timeout = 45", "builder-token = open-sesame")
    with running_server(
        tmp_path / "state", upstream=f"oci:{tmp_path}", run=with_config(file)
    ) as server:
        assert "listening on" not in server.log
        configured(
            file,
            "log-level = info, web.devices.app=warn",
            "request-timeout = 46",
            "builder-token = open-sesame-2",
        )
        hang_up(server)
        assert "reload: log-level is info, web.devices.app=warn now" in server.log
        assert "reload: request-timeout = 46 takes effect after a restart" in server.log
        assert "reload: builder-token = (secret) takes effect after a restart" in server.log
        assert "sesame" not in server.log
        configured(file, "log-level = loud")
        hang_up(server, 2)
        assert (
            "reload: the settings stay as they are: setting log-level has the value 'loud'"
            in server.log
        )
        with urllib.request.urlopen(f"{server.operator_url}/healthz", timeout=30) as answer:
            assert answer.status == 200


def test_a_reload_reaches_all_server_processes(tmp_path: Path) -> None:
    """Processes that start later have it too."""
    file, issuer = tmp_path / "tap.conf", Issuer("ES256")
    key = issuer.write(tmp_path)
    configured(file, "log-level = info, web=error")
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{tmp_path}",
        run=with_config(file),
        processes="2",
        auth="token",
        auth_key=str(key),
        auth_issuer=issuer.issuer,
        auth_audience=AUDIENCE,
        auth_realm="https://api.example.com/auth/v1/token",
    ) as server:
        (first,) = serving(server, 1)
        assert status_of(server, first, issuer, "/v2/before/tags/list") == 404
        configured(file, "log-level = info")
        hang_up(server)
        until(
            "both have read the key again",
            lambda: server.log.count(f"key file {key} was read again") == 2,
        )
        assert status_of(server, first, issuer, "/v2/after/tags/list") == 404
        until("the further one logs requests now", lambda: "path=/v2/after/tags/list" in server.log)
        assert "path=/v2/before/tags/list" not in server.log
        os.kill(first, signal.SIGKILL)
        until("another one serves", lambda: server.log.count(" is ready (pid ") == 2)
        (second,) = further(server)
        assert status_of(server, second, issuer, "/v2/later/tags/list") == 404
        until("it has the new levels", lambda: "path=/v2/later/tags/list" in server.log)


def status_of(server: RunningServer, pid: int, issuer: Issuer, path: str) -> int:
    connection = connection_to(server, pid)
    token = issuer.token(pulls(path.split("/")[2]))
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    status = connection.getresponse().status
    connection.close()
    return status


def expiry(server: RunningServer) -> dict[str, float]:
    """Returns the gauge of the certificates in use: file to seconds since 1970."""
    with urllib.request.urlopen(f"{server.operator_url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    name = "obdelta_certificate_not_after_timestamp_seconds"
    found = re.findall(rf'^{name}\{{file="([^"]+)"\}} (.*)$', text, re.MULTILINE)
    return {file: float(value) for file, value in found}


def test_a_reload_reads_certificates(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    pem, _ = keys.issue("delta", HOST)
    port = free_port()
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{tmp_path}",
        port=port,
        processes="2",
        tls_certificate=str(pem),
    ) as server:
        serving(server, 1)
        assert f"devices: listening on https://127.0.0.1:{port}\n" in server.log
        assert f"operators: listening on {server.operator_url}\n" in server.log
        assert not re.search(r"starting on|Starting factory", server.log)
        assert expiry(server) == {str(pem): keys.expires("delta")}
        keys.issue("delta", HOST)
        assert server.log.count("certificate in use") == 2
        hang_up(server)
        until("both processes have it", lambda: server.log.count("certificate in use") == 4)
        device = Device(port, keys)
        assert device.serial == keys.serial("delta")
        device.close()
        pem.write_text("nonsense")
        hang_up(server, 2)
        until(
            "both say so",
            lambda: server.log.count(f"{pem} cannot be used: ") == 2,
        )
        Device(port, keys).close()


def test_unused_signals_are_ignored(tmp_path: Path) -> None:
    with running_server(tmp_path / "state", upstream=f"oci:{tmp_path}", processes="2") as server:
        (other,) = serving(server, 1)
        for name in MEANINGLESS:
            for pid in (server.process.pid, other):
                os.kill(pid, signal.Signals[name])
            until(
                f"{name} was heard",
                lambda name=name: server.log.count(f"{name} was ignored") == 2,  # type: ignore[misc]
            )
        os.kill(other, signal.SIGHUP)
        assert server.process.poll() is None
        assert serving(server, 1) == [other]


def test_workers_survive_signals_to_the_process_group(tmp_path: Path) -> None:
    """Sends signals as ``systemctl kill --signal=SIGHUP`` does."""
    with running_server(tmp_path / "state", upstream=f"oci:{tmp_path}", max_builds="1") as server:
        workers = until("workers are there", lambda: children(server.process.pid))
        ready(server)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
            for worker in workers:
                os.kill(worker, number)
        ready(server)
        assert children(server.process.pid) == workers


def children(pid: int) -> list[int]:
    """Returns the worker processes, once they work: before that nothing is set up in them."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ignored = [int(status(int(child), "SigIgn"), 16) & 1 << signal.SIGHUP - 1 for child in found]
    return [int(child) for child in found] if found and all(ignored) else []


def status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field))


def ready(server: RunningServer) -> None:
    try:
        urllib.request.urlopen(f"{server.operator_url}/readyz", timeout=30).close()
    except urllib.error.HTTPError as error:
        error.close()


def test_sigquit_drains_before_the_end(tmp_path: Path) -> None:
    with running_server(
        tmp_path / "state", upstream=f"oci:{tmp_path}", stop_with=signal.SIGQUIT
    ) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    assert server.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_moved_log_file_is_opened_again(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run(*options: str) -> list[str]:
        twistd, *rest = command(*options)
        return [twistd, f"--logfile={log}", *rest]

    with running_server(tmp_path / "state", upstream=f"oci:{tmp_path}", run=run) as server:
        if number == signal.SIGHUP:
            log.rename(tmp_path / "log.old")
        server.process.send_signal(number)
        until("there are two", lambda: len(list(tmp_path.glob("log*"))) == 2)
        with urllib.request.urlopen(f"{server.operator_url}/healthz", timeout=30):
            pass
        server.process.terminate()
        assert server.process.wait(STOP_SECONDS) == 0
    assert "Server Shut Down" in log.read_text()
