"""Warnings of `obdelta doctor` about files and values, and what it advises."""

from __future__ import annotations

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from obdelta.cli.commands.setup import doctor as doctor_command
from obdelta.device.http import ServerFault
from obdelta.settings.schema import SECTIONS
from obdelta.web.operators.passwords import make_line
from tests.support.doctor_findings import Output, doctor, warning_of, write
from tests.support.tokens import make_certificate, make_key, private_pem


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
