"""`obdelta doctor`: all errors that would stop a start, and warnings for what is probably wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from obdelta.app import setup_checks
from obdelta.cli.commands.setup import doctor as doctor_command
from obdelta.cli.main import main
from obdelta.device.http import ServerFault
from obdelta.settings.schema import SECTIONS
from obdelta.web.operators.passwords import make_line
from tests.support.commands import OBDELTA, environment
from tests.support.faketime import SystemTime
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.tokens import make_certificate, make_key, private_pem, public_pem

Output = pytest.CaptureFixture[str]
__all__ = ["plain_registry"]


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


def test_a_quota_whose_unit_is_missing_is_found(tmp_path: Path, capsys: Output) -> None:
    line = warning_of(write(tmp_path, store_quota="1000"), capsys)
    assert "it is 1,000 bytes, less than most deltas have: give it a unit" in line


def test_one_endpoint_for_devices_and_operators_is_an_error(tmp_path: Path, capsys: Output) -> None:
    endpoint = "tcp:8080:interface=127.0.0.1"
    file = write(tmp_path, operator_listen=endpoint)
    (error,) = doctor(file, capsys)["errors"]
    assert "expected another port than listen has" in error and error.endswith(f"{file}:8)")


def test_settings_that_tokens_need_are_described(tmp_path: Path, capsys: Output) -> None:
    errors = doctor(write(tmp_path, auth="token"), capsys)["errors"]
    shown = "\n".join(errors)
    for words in (
        "setting auth-key is missing: expected the API's public key",
        "setting auth-issuer is missing: expected the issuer of tokens (api.example.com), or",
        "setting auth-realm is missing: expected the URL where clients get tokens",
    ):
        assert words in shown
    assert "from default" not in shown


@pytest.mark.parametrize(
    ("why", "shown", "remedy"),
    [
        (
            "failed at r:443: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed:"
            " certificate has expired (_ssl.c:1006)",
            "certificate verify failed: certificate has expired",
            "renew the registry's certificate, or set this machine's clock",
        ),
        (
            "failed at r:443: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname"
            " mismatch, certificate is not valid for 'r'. (_ssl.c:1006)",
            "certificate verify failed: Hostname mismatch, certificate is not valid for 'r'.",
            "use a name in upstream that the certificate contains",
        ),
        (
            "failed at r:443: [SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)",
            "wrong version number",
            "the registry serves no TLS there: write http, or correct the port",
        ),
        (
            "failed at r:80: [Errno -2] Name or service not known",
            "Name or service not known",
            "correct the name, or this machine's DNS",
        ),
        ("did not answer in time", "did not answer in time", "check the network and firewalls"),
    ],
)
def test_an_upstream_that_cannot_be_reached_has_a_remedy(why: str, shown: str, remedy: str) -> None:
    found = doctor_command._why(ServerFault("GET /v2/", why))
    assert found == shown and doctor_command._remedy(found).startswith(remedy)


def test_a_zero_quota_and_a_small_disk_are_found(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "store-quota" in warning_of(write(tmp_path, store_quota="0"), capsys)
    file = write(tmp_path, store_quota="1000 TiB")
    assert "bytes free: the disk fills before the quota counts" in warning_of(file, capsys)
    # Stored content counts as free space.
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".obdelta-state").touch()
    (tmp_path / "state" / "content").write_bytes(b"x" * (2 << 20))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 40, 0, 1 << 20))
    assert doctor(write(tmp_path, store_quota="2 MiB"), capsys)["warnings"] == []
    assert "1,048,576 bytes free" in warning_of(write(tmp_path, store_quota="4 MiB"), capsys)


def test_a_secret_that_all_users_can_read_is_found(tmp_path: Path, capsys: Output) -> None:
    file = write(tmp_path, builder_token="open-sesame")
    line = warning_of(file, capsys)
    assert line.startswith(f"builder-token ({file}:8): all users of this machine can read")
    assert "sesame" not in line
    file.chmod(0o640)
    assert doctor(file, capsys)["warnings"] == []


SECRET_FILES = {
    "operator-passwords",
    "api-token",
    "tls-key",
    "tls-certificate",
    "docker-cert-path",
    "state-dir",
}
PUBLIC_FILES = {"auth-key", "upstream-ca", "shared-ca", "delta-rsync"}


def test_each_secret_file_that_all_users_can_read_is_found(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, engine, tls = tmp_path / "state", tmp_path / "engine", tmp_path / "tls.pem"
    state.mkdir(0o700)
    engine.mkdir()
    key = make_key("ES256")
    certificate = make_certificate(key, "127.0.0.1")
    files = {
        "operator-passwords": tmp_path / "operators",
        "api-token": tmp_path / "token",
        "tls-key": tmp_path / "tls.key",
        "docker-cert-path": engine / "key.pem",
        "state-dir": state / "operator-key",
    }
    (state / ".obdelta-state").touch()
    for path in files.values():
        path.touch(0o640)
        path.write_bytes(private_pem(key))
    files["operator-passwords"].write_text(make_line("alice", "secret"))
    tls.write_bytes(certificate)
    settings = {
        "operator_passwords": str(files["operator-passwords"]),
        "api_token": str(files["api-token"]),
        "tls_certificate": str(tls),
        "public_url": "https://127.0.0.1:8080",
    }
    monkeypatch.setenv("DOCKER_CERT_PATH", str(engine))
    file = write(tmp_path, **settings, tls_key=str(files["tls-key"]))
    found = doctor(file, capsys)
    assert found["errors"] == []
    for setting, path in files.items():
        path.chmod(0o644)
        (line,) = [one for one in doctor(file, capsys)["warnings"] if "can read" in one]
        assert line.startswith(f"{setting} (") and f"can read {path}, which has secrets" in line
        path.chmod(0o640)
    # A certificate has no secret, unless its key is in the same file.
    tls.write_bytes(certificate + private_pem(key))
    tls.chmod(0o644)
    assert not any("can read" in one for one in doctor(file, capsys)["warnings"])
    (line,) = doctor(write(tmp_path, **settings), capsys)["warnings"]
    assert line.startswith("tls-certificate (") and f"can read {tls}" in line


def test_a_directory_in_place_of_a_secret_is_found(tmp_path: Path, capsys: Output) -> None:
    """Docker makes one if the file of a bind mount is missing; another mode would not help."""
    token = tmp_path / "token"
    token.mkdir()
    file = write(tmp_path, api_token=str(token))
    mount = "remove it, and put the file there (Docker makes a directory where a file to mount"
    found = doctor(file, capsys)["warnings"]
    assert any(f"{token} is a directory, and should be a file: {mount}" in line for line in found)
    assert not any("chmod" in line for line in found)
    token.rmdir()
    state = tmp_path / "state"
    (state / "operator-key").mkdir(parents=True)
    (state / ".obdelta-state").touch()
    found = doctor(file, capsys)["warnings"]
    own = "operator-key is a directory, and should be a file: remove it: the server writes this"
    assert any(own in line for line in found)


def test_every_setting_that_names_files_is_known_as_secret_or_public() -> None:
    named = {
        field.name.replace("_", "-")
        for section in SECTIONS
        for field in dataclasses.fields(section)
        if "Path" in str(field.type)
    }
    assert named == SECRET_FILES | PUBLIC_FILES
    assert not SECRET_FILES & PUBLIC_FILES


def test_an_unusable_password_file_is_an_error(tmp_path: Path, capsys: Output) -> None:
    passwords = tmp_path / "operators"
    passwords.write_text("alice:secret")
    (error,) = doctor(write(tmp_path, operator_passwords=str(passwords)), capsys)["errors"]
    assert "line 1 is not one that `obdelta password` prints" in error


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
