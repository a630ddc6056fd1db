"""`obdelta doctor`: all errors that would stop a start, and warnings for what is probably wrong."""

from __future__ import annotations

import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from obdelta.app import setup_checks
from obdelta.cli.main import main
from tests.support.commands import OBDELTA, environment
from tests.support.doctor_findings import Output, certificate, doctor, warning_of, write
from tests.support.faketime import SystemTime
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.tokens import make_certificate, make_key, public_pem

__all__ = ["plain_registry"]


def test_good_settings_have_no_findings(tmp_path: Path, capsys: Output) -> None:
    assert main(["doctor", "-c", str(write(tmp_path))]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"
    assert main(["settings", "--check", "-c", str(write(tmp_path))]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tap.conf"]


def test_all_errors_of_a_start_are_displayed_with_their_places(
    tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "thesis.txt").write_text("precious")
    file = write(
        tmp_path,
        auth="token",
        auth_key="/nowhere/api.pem",
        auth_issuer="a",
        auth_audience="b",
        auth_realm="https://c/",
        tls_certificate="/nowhere/tls.pem",
        operator_listen="tcp:x",
        upstream_ca=str(tmp_path / "tap.conf"),
        publish="registry",
    )
    lines = file.read_text().splitlines()
    errors = doctor(file, capsys)["errors"]
    for key, why in {
        "auth-key": "No such file",
        "tls-certificate": "No such file",
        "operator-listen": "a Twisted server endpoint string",
        "upstream-ca": "at least one certificate",
        "publish": "where the upstream is oci:DIR",
        "state-dir": "it holds thesis.txt, and nothing was touched",
    }.items():
        (error,) = (line for line in errors if line.startswith(f"setting {key} "))
        number = next(n for n, line in enumerate(lines, 1) if line.startswith(f"{key} ="))
        assert why in error and error.endswith(f"(from {file}:{number})")
    assert len(errors) == 6
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["thesis.txt"]


def test_errors_of_the_settings_file_are_findings(tmp_path: Path, capsys: Output) -> None:
    file = write(tmp_path, effort="most", drain="soon")
    assert main(["doctor", "-c", str(file)]) == 2
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("error: setting effort has the value 'most'")
    assert shown[1].startswith("error: setting drain has the value 'soon'")
    assert shown[2] == "2 errors, 0 warnings"


def test_a_certificate_for_another_name_is_found(tmp_path: Path, capsys: Output) -> None:
    tls = certificate(tmp_path, "delta.example.org")
    file = write(tmp_path, tls_certificate=str(tls), public_url="https://delta.example.com:8443")
    assert f"tls-certificate ({file}:8): no certificate covers delta.example.com" in warning_of(
        file, capsys
    )
    fits = write(tmp_path, tls_certificate=str(tls), public_url="https://Delta.example.org:8443")
    assert doctor(fits, capsys) == {"errors": [], "warnings": []}
    plain = write(tmp_path, tls_certificate=str(tls), public_url="http://delta.example.org")
    assert "it is http, but listen has a certificate" in warning_of(plain, capsys)


def test_certificates_and_keys_that_expire_soon_are_found(tmp_path: Path, capsys: Output) -> None:
    tls = certificate(tmp_path, "delta.example.org", days=3)
    file = write(tmp_path, tls_certificate=str(tls), public_url="https://delta.example.org")
    assert f"{tls} expires on " in warning_of(file, capsys)
    key = make_key("ES256")
    api = tmp_path / "api.pem"
    token = {
        "auth": "token",
        "auth_key": str(api),
        "auth_issuer": "a",
        "auth_audience": "b",
        "auth_realm": "https://c/",
    }
    api.write_bytes(make_certificate(key, "api", days=-1))
    assert f"auth-key ({tmp_path}/tap.conf:8): {api} expired on " in warning_of(
        write(tmp_path, **token), capsys
    )
    api.write_bytes(public_pem(key))
    assert doctor(write(tmp_path, **token), capsys)["warnings"] == []


def test_https_without_a_certificate_needs_a_proxy(tmp_path: Path, capsys: Output) -> None:
    file = write(tmp_path, public_url="https://127.0.0.1:9")
    line = warning_of(file, capsys)
    assert "it is https, but listen has no certificate, and no proxy ends TLS" in line
    assert "Connection refused" in line


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp:9100", False),
        ("tcp:9100:interface=0.0.0.0", False),
        ("tcp:9100:interface=127.0.0.1", True),
        ("tcp:9100:interface=127.1.2.3", True),
        ("tcp6:9100:interface=\\:\\:1", True),
        ("tcp6:9100:interface=\\:\\:", False),
        ("unix:/run/operators", True),
        ("systemd:domain=INET:name=x", False),
        ("tcp:9100:interface=here", False),
        ("tcp:9100:interface=localhost", True),
    ],
)
def test_endpoints_beyond_this_machine_are_recognised(endpoint: str, local: bool) -> None:
    assert setup_checks.is_local(endpoint) is local


def test_an_open_operators_page_beyond_this_machine_is_found(
    tmp_path: Path, capsys: Output
) -> None:
    file = write(tmp_path, operator_listen="tcp:9100", listen="tcp:8080")
    operators, devices = doctor(file, capsys)["warnings"]
    assert operators.startswith(f"operator-listen ({file}:8): tcp:9100 is open beyond this machine")
    assert devices.startswith(f"auth ({file}:7): it is none, and tcp:8080 is open beyond")


def test_old_names_are_warnings(tmp_path: Path, capsys: Output) -> None:
    assert "setting hold is now request-timeout" in warning_of(write(tmp_path, hold="45"), capsys)


def test_an_upstream_that_is_no_registry_is_found(
    tmp_path: Path, capsys: Output, plain_registry: RunningRegistry
) -> None:
    assert doctor(write(tmp_path, upstream=plain_registry.url), capsys)["warnings"] == []
    line = warning_of(write(tmp_path, upstream="http://127.0.0.1:9"), capsys)
    assert line.endswith(
        "http://127.0.0.1:9 cannot be reached: Connection refused: check that the registry runs,"
        " and the URL"
    )
    missing = write(tmp_path, upstream=f"oci:{tmp_path}/missing")
    assert f"{tmp_path}/missing is no directory" in warning_of(missing, capsys)

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert f"{url}/v2/ answered 404" in warning_of(write(tmp_path, upstream=url), capsys)
        thread.join()


def test_a_clock_that_differs_from_the_registrys_is_found(
    tmp_path: Path, plain_registry: RunningRegistry
) -> None:
    clock = SystemTime(tmp_path / "clock")
    for hours, side in ((2, "ahead of"), (-2, "behind")):
        clock.set(hours)
        ran = subprocess.run(
            [*OBDELTA, "doctor", "-c", str(write(tmp_path, upstream=plain_registry.url))],
            env={**environment(), **clock.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 3, ran.stderr
        seconds = int(ran.stdout.partition("the clock here is ")[2].partition(" s ")[0])
        assert abs(seconds - 7200) < 60
        assert f" s {side} that of {plain_registry.url}: tokens would count" in ran.stdout
