"""`obdelta completion`: the scripts, as the shells themselves use them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import run

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    made = {}
    for shell in ("bash", "zsh", "fish"):
        made[shell] = folder / f"obdelta.{shell}"
        made[shell].write_bytes(run("completion", shell).stdout)
    return made


def in_bash(script: Path, *words: str, cwd: Path) -> list[str]:
    """Returns what bash offers for the last word of a command line."""
    line = f"""source {script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
function=$(complete -p obdelta | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function obdelta "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}" """
    ran = subprocess.run(
        ["bash", "--norc", "-c", line], capture_output=True, text=True, check=True, cwd=cwd
    )
    return ran.stdout.split()


def in_fish(script: Path, line: str, cwd: Path) -> list[str]:
    """Returns what fish offers at the end of a command line."""
    ran = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    return [offer.partition("\t")[0] for offer in ran.stdout.splitlines()]


def test_bash_completes_commands_and_options(scripts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "old.tar").touch()
    (tmp_path / "folder").mkdir()
    assert {"diff", "patch", "build", "check", "settings"} <= set(
        in_bash(scripts["bash"], "obdelta", "", cwd=tmp_path)
    )
    assert in_bash(scripts["bash"], "obdelta", "set", cwd=tmp_path) == ["settings"]
    assert in_bash(scripts["bash"], "obdelta", "check", "--require", cwd=tmp_path) == [
        "--require-delta"
    ]
    assert in_bash(scripts["bash"], "obdelta", "diff", "a", "b", "--effort", "f", cwd=tmp_path) == [
        "fast"
    ]
    assert in_bash(scripts["bash"], "obdelta", "completion", "z", cwd=tmp_path) == ["zsh"]
    assert in_bash(scripts["bash"], "obdelta", "diff", "o", cwd=tmp_path) == ["old.tar"]
    assert in_bash(scripts["bash"], "obdelta", "build", "a", "b", "-o", "f", cwd=tmp_path) == [
        "folder"
    ]


def test_fish_completes_commands_and_options(scripts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "old.tar").touch()
    assert {"diff", "patch", "build"} <= set(in_fish(scripts["fish"], "obdelta ", tmp_path))
    assert in_fish(scripts["fish"], "obdelta sett", tmp_path) == ["settings"]
    assert "--require-delta" in in_fish(scripts["fish"], "obdelta check --req", tmp_path)
    assert "old.tar" in in_fish(scripts["fish"], "obdelta diff ol", tmp_path)


def test_zsh_loads_the_script(scripts: dict[str, Path]) -> None:
    subprocess.run(["zsh", "-n", scripts["zsh"]], check=True)
    assert scripts["zsh"].read_text().startswith("#compdef obdelta\n")
    loaded = "autoload -Uz compinit && compinit -D -u && source $0 && whence -w _shtab_obdelta"
    ran = subprocess.run(
        ["zsh", "-f", "-c", loaded, scripts["zsh"]], capture_output=True, text=True, check=False
    )
    assert "_shtab_obdelta: function" in ran.stdout, ran.stderr


def test_another_shell_is_wrong_usage() -> None:
    error = run("completion", "csh", status=2).stderr
    assert b"'csh' cannot be used: the choices are bash, zsh, fish" in error
