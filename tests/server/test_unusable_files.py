"""Files that become unusable while the server runs are reported until they are repaired."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from obdelta.web.operators.passwords import make_line
from tests.support.processes import until
from tests.support.server import RunningServer, running_server
from tests.support.tokens import AUDIENCE, Issuer


def attention(server: RunningServer) -> list[str]:
    with urllib.request.urlopen(f"{server.operator_url}/api/v1/status", timeout=30) as answer:
        return [problem["what"] for problem in json.load(answer)["attention"]]


def test_a_lost_key_and_a_broken_password_file_need_attention(tmp_path: Path) -> None:
    """No device and no operator has to log in before they are found."""
    issuer = Issuer("ES256")
    key, passwords = issuer.write(tmp_path), tmp_path / "operators"
    good = make_line("alice", "secret")
    passwords.write_text(good)
    with running_server(
        tmp_path / "state",
        upstream=f"oci:{tmp_path}",
        auth="token",
        auth_key=str(key),
        auth_issuer=issuer.issuer,
        auth_audience=AUDIENCE,
        auth_realm="https://api.example.com/auth/v1/token",
        operator_passwords=str(passwords),
    ) as server:
        assert attention(server) == []
        key.rename(tmp_path / "elsewhere")
        passwords.write_text("alice:secret\n")
        both = [
            f"The key file {key} (auth-key) cannot be used: No such file or directory: the old key"
            " stays in force",
            f"The file {passwords} (operator-passwords) cannot be used: line 1 is not one that"
            " `obdelta password` prints: no one can log in",
        ]
        until("both are reported", lambda: attention(server) == both)
        (tmp_path / "elsewhere").rename(key)
        until("the key is used again", lambda: attention(server) == both[1:])
        passwords.write_text(good)
        passwords.chmod(0o666)
        writable = "every user of this machine may write it (chmod o-w): no one can log in"
        until("the mode is refused", lambda: any(writable in line for line in attention(server)))
        passwords.chmod(0o600)
        until("another mode is enough", lambda: attention(server) == [])
