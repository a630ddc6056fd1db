"""`obdelta init`: writes a valid file, or none."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest
import yaml

from obdelta.cli.main import main
from obdelta.settings import read
from tests.support.commands import OBDELTA, environment, error_of, run
from tests.support.registry import RunningRegistry, plain_registry
from tests.support.tokens import make_key, public_pem

DEPLOY = Path(__file__).parents[3] / "deploy"
Output = pytest.CaptureFixture[str]
__all__ = ["plain_registry"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def registry(upstream: str, *more: str) -> list[str]:
    return [
        *("init", "--for", "registry", "--upstream", upstream, "--state-dir", "state"),
        *("--public-url", "http://127.0.0.1:8080", "--listen", "tcp:8080:interface=127.0.0.1"),
        *more,
    ]


def test_the_doctor_finds_nothing_in_the_written_file(
    folder: Path, plain_registry: RunningRegistry, capsys: Output
) -> None:
    # The disk of a test is smaller than the default quota.
    main(registry(plain_registry.url, "--auth", "none"))
    assert capsys.readouterr().out.splitlines()[-1] == "tap.conf is written. Next: obdelta serve"
    configured = read({}, {}, folder / "tap.conf")
    assert configured.auth == "none" and configured.state_dir == folder / "state"
    content = (folder / "tap.conf").read_text()
    assert "\n# The registry that images come from.\nupstream = http" in content
    assert "\n#store-quota = 20 GiB\n" in content
    assert main(["doctor", "--store-quota", "1 MiB"]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings\n"


def test_a_key_is_checked_before_anything_is_written(
    folder: Path, plain_registry: RunningRegistry, capsys: Output
) -> None:
    token = ("--auth", "token", "--domain", "example.com", "--auth-key", "api.pem")
    assert main(registry(plain_registry.url, *token)) == 2
    assert "setting auth-key has the value" in capsys.readouterr().err
    (folder / "api.pem").write_text("not a key")
    assert main(registry(plain_registry.url, *token)) == 2
    assert "setting auth-key has the value" in capsys.readouterr().err
    assert not (folder / "tap.conf").exists()
    (folder / "api.pem").write_bytes(public_pem(make_key("ES256")))
    assert main(registry(plain_registry.url, *token)) in (0, 3)  # 3: a small disk
    configured = read({}, {}, folder / "tap.conf")
    assert configured.auth_key == folder / "api.pem"
    assert configured.auth_issuer == "api.example.com"
    assert configured.auth_audience == ("registry2.example.com",)
    assert configured.auth_realm == "https://api.example.com/auth/v1/token"


def test_all_invalid_values_are_named(folder: Path, capsys: Output) -> None:
    assert main(registry("registry", "--auth", "none", "--listen", "nowhere")) == 2
    assert main(registry("oci:x", "--auth", "none", "--listen", "nowhere")) == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(" has ")[0] for line in shown] == [
        "obdelta: setting upstream",
        "obdelta: setting listen",
    ]
    assert not list(folder.iterdir())


def test_a_service_that_does_not_answer_is_a_warning(folder: Path, capsys: Output) -> None:
    assert main(registry("http://registry.invalid", "--auth", "none")) == 3
    shown = capsys.readouterr().out
    assert "warning: the name registry.invalid cannot be resolved here" in shown
    assert "warning: upstream: http://registry.invalid cannot be reached: " in shown
    assert (folder / "tap.conf").exists()


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "tap.conf").symlink_to("/nowhere")
    (folder / "obdelta.env").write_text("mine")
    options = registry("oci:x", "--auth", "none")
    kept = "exists and is not overwritten: name another file with --output"
    assert f"tap.conf {kept}" in error_of(run(*options, status=2, cwd=folder))
    compose = ("init", "--for", "compose", "--domain", "example.com")
    assert f"obdelta.env {kept}" in error_of(run(*compose, status=2, cwd=folder))
    assert (folder / "obdelta.env").read_text() == "mine"
    run(*options, "-o", "new/other.conf", status=3, cwd=folder)  # oci:x is no directory
    assert (folder / "new/other.conf").exists()


def test_without_a_terminal_a_missing_option_is_named(folder: Path) -> None:
    assert "--for is missing" in error_of(run("init", status=2, cwd=folder))
    ran = run("init", "--for", "registry", "--upstream", "oci:x", status=2, cwd=folder)
    assert "--public-url is missing" in error_of(ran)
    assert not list(folder.iterdir())


def test_it_asks_on_a_terminal(folder: Path) -> None:
    own_end, child_end = pty.openpty()
    answers = ["", f"oci:{folder}", "http://127.0.0.1:8080", "perhaps", "none"]
    os.write(own_end, "".join(f"{answer}\n" for answer in answers).encode())
    try:
        ran = subprocess.run(
            [*OBDELTA, "init", "--state-dir", "state"],
            stdin=child_end,
            capture_output=True,
            cwd=folder,
            env=environment(),
            check=False,
            text=True,
        )
    finally:
        os.close(own_end)
        os.close(child_end)
    assert ran.returncode == 3, ran.stderr  # open to all clients, as requested
    assert ran.stderr.count("Who may pull?") == 2  # "perhaps" is no answer
    configured = read({}, {}, folder / "tap.conf")
    assert configured.auth == "none" and configured.public_url == "http://127.0.0.1:8080"


def environment_of(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_compose_gets_the_settings_of_the_overlay(folder: Path) -> None:
    main(["init", "--for", "compose", "--domain", "example.invalid"])
    made = environment_of((folder / "obdelta.env").read_text())
    assert made == environment_of((DEPLOY / "compose/obdelta.env").read_text())
    overlay = {"BALENA_TLD": "example.invalid", "REGISTRY_HOST": "registry2.example.invalid"}
    assert read({}, made | overlay).public_url == "https://delta.example.invalid"


def test_helm_gets_the_values_of_deploy(folder: Path) -> None:
    image = "registry.example.com:5000/obdelta:0.1.0"
    main(["init", "--for", "helm", "--domain", "example.invalid", "--image", image])
    made = yaml.safe_load((folder / "values.yaml").read_text())
    shipped = yaml.safe_load((DEPLOY / "helm/values.yaml").read_text())
    assert made["delta"].pop("image") == {
        "repository": "registry.example.com:5000/obdelta",
        "tag": "0.1.0",
        "pullPolicy": "IfNotPresent",
    }
    del shipped["delta"]["image"]
    assert made == shipped
