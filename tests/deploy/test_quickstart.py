"""The pages that a newcomer follows: every command is run, and its output is compared with the
page.

Registries and servers have the pages' ports, in separate network namespaces.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import OBDELTA
from tests.support.newcomer import bash
from tests.support.pages import Block, blocks, shape
from tests.support.tokens import Issuer, make_certificate, private_pem, public_pem

pytestmark = pytest.mark.timeout(900)  # it installs the package and its dependencies
PAGE = blocks("docs/quickstart.md")


def in_section(*names: str) -> list[Block]:
    return [block for block in PAGE if block.section in names]


SYSTEMD = blocks("docs/systemd.md")
WATCHING = [block for block in blocks("docs/openbalena.md") if block.section == "Watch it"]


def test_the_page_has_the_steps() -> None:
    sections = [block.section for block in PAGE]
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)
    assert set(sections) == {
        "Install",
        "A registry with two releases",
        "The server",
        "Be a device",
        "The status page",
        "Clean up",
    }
    assert len(in_section("Clean up")) == 1


def test_a_newcomer_sees_what_the_page_promises(newcomer: Path) -> None:
    # Each block's output goes to its own file; jobs belong to this shell.
    steps = [block for block in PAGE if block.section not in ("Install", "Clean up")]
    script = [
        "ip link set lo up",
        'export PATH="$PWD/venv/bin:$PATH"',
        "mkdir ../out",
        "out=$PWD/../out",
    ]
    for number, block in enumerate(steps):
        script += [f"exec 3>&1 >$out/{number} 2>&1", block.commands, "exec >&3 2>&1 3>&-"]
    script += [
        "curl -sf http://127.0.0.1:9100/ >$out/page",
        *(block.commands for block in in_section("Clean up")),
        "test ! -e quickstart",
        'for each in $out/*; do echo "== ${each##*/}"; cat $each; done',
    ]
    shown = bash("\n".join(script), newcomer, "unshare", "--net", "--pid", "--fork", "--kill-child")
    outputs = dict(part.split("\n", 1) for part in shown.split("== ") if "\n" in part)
    promises = 0
    for number, block in enumerate(steps):
        if block.promised:
            promises += 1
            assert shape(outputs[str(number)]) == shape(block.promised), outputs[str(number)]
    assert promises == 3
    assert "ready" in outputs[str(steps.index(in_section("The server")[-1]))]
    status = outputs[str(steps.index(in_section("The status page")[-1]))]
    assert "state    ready" in status and "demo@" in status
    assert "demo" in outputs["page"] and "<svg" in outputs["page"]


VIEW = (
    "mkdir -p ../view && mount -t tmpfs tmpfs ../view",
    "for each in etc usr/local opt var/lib; do",
    "  upper=../view/$each; mkdir -p $upper/new $upper/work",
    "  mount -t overlay overlay /$each -o lowerdir=/$each,upperdir=$upper/new,workdir=$upper/work",
    "done",
    # The dependencies are installed already.
    "mkdir -p /opt/obdelta && mount --bind venv /opt/obdelta",
)
"""Commands that give a mount namespace its own copies of this machine's directories."""


def test_the_readme_leads_to_a_server(newcomer: Path) -> None:
    """`obdelta init` asks on a terminal, which script(1) provides."""
    (by_hand,) = (block.commands for block in blocks("README.md") if block.section == "Run it")
    *install, init, serve = by_hand.splitlines()
    answers = ["registry", "http://127.0.0.1:5050", "http://127.0.0.1:8080", "none"]
    script = [
        "ip link set lo up",
        *VIEW,
        *install,
        f"printf '%s\\n' {' '.join(answers)} | script -qec '{init}' /dev/null || test $? = 3",
        f"{serve} >../readme.log 2>&1 &",
        "until curl -sf http://127.0.0.1:8080/healthz; do sleep 1; done",
        "(cd / && /opt/obdelta/bin/obdelta status) || test $? = 3",
        "kill $!",
        "wait",
    ]
    namespaces = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
    shown = bash("\n".join(script), newcomer, "unshare", *namespaces)
    assert "/etc/obdelta/tap.conf is written" in shown
    assert "not ready: upstream: " in shown  # no registry is there


def test_the_systemd_page_installs_and_configures(newcomer: Path) -> None:
    """Runs in a view of this machine's directories that only the test changes.
    tests/support/booted.py boots the units.
    """
    # A copy without git has another version than the checkout.
    version = bash("venv/bin/obdelta --version", newcomer).strip()
    issuer = Issuer("ES256")
    private = newcomer.parent / "private"
    private.mkdir()
    (private / "api.pem").write_bytes(public_pem(issuer.key))
    (private / "delta.pem").write_bytes(make_certificate(issuer.key, "delta.example.com"))
    (private / "delta.key").write_bytes(private_pem(issuer.key))
    run = [block.commands for block in SYSTEMD if block.section == "Install"]
    configure = [block.commands for block in SYSTEMD if block.section == "Configure"]
    (check,) = (block.commands for block in SYSTEMD if "obdelta doctor" in block.commands)
    *leave, doctor, status = check.splitlines()
    assert doctor.startswith("obdelta doctor") and status == "obdelta status"
    script = [
        *VIEW,
        *run,
        f"cp {private}/* /etc/obdelta/",
        "set +e",  # the domain is an example: init and doctor warn that nothing answers
        configure[0],
        "echo init: $?",
        *configure[1:],
        *leave,  # the checkout's own tap.conf would be found there
        doctor,
        "echo doctor: $?",
        "set -e",
        "test -e /etc/systemd/system/obdelta.socket",
        'documentation=$(sed -n "s/^Documentation=file://p" /etc/systemd/system/obdelta.service)',
        'grep -q "# obdelta under systemd" "$documentation"',
        "command -v obdelta",
        'exec="$(sed -n "s/^ExecStart=\\([^ ]*\\).*/\\1/p" /etc/systemd/system/obdelta.service)"',
        '"$exec" obdelta --version',
    ]
    shown = bash("\n".join(script), newcomer, "unshare", "--mount", "--net")
    assert "init: 3\n" in shown and "doctor: 3\n" in shown
    assert "/etc/obdelta/tap.conf is written" in shown
    assert re.search(r"^0 errors, \d warnings?$", shown, re.MULTILINE), shown
    assert "upstream (/etc/obdelta/tap.conf:" in shown  # doctor found the file by itself
    assert shown.splitlines()[-2:] == ["/usr/local/bin/obdelta", version]


def test_prometheus_scrapes_as_the_compose_guide_says(tmp_path: Path) -> None:
    """Debian's Prometheus in place of its image, at the guide's ports."""
    write, start, ask = (block.commands for block in WATCHING)
    assert "prometheus.yml:/etc/prometheus/prometheus.yml:ro" in start
    script = [
        "ip link set lo up",
        f"{OBDELTA[0]} serve --auth none --upstream oci:. --public-url http://localhost"
        " --listen tcp:8080 --operator-listen tcp:9100 --state-dir state >obdelta.log 2>&1 &",
        write.replace("15s", "1s"),
        "promtool check config prometheus.yml",
        "prometheus --config.file prometheus.yml --storage.tsdb.path data >prometheus.log 2>&1 &",
        "for second in $(seq 120); do",
        f"    answer=$({ask} || true)",
        """    case $answer in *'"1"]'*) break;; esac""",
        "    sleep 1",
        "done",
        "kill $(jobs -p)",
        "wait",
        'echo "$answer"',
    ]
    ran = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert '"job":"obdelta"' in ran.stdout and '"1"]' in ran.stdout, ran.stdout + ran.stderr
