"""``obdelta init``: writes a first settings file, and checks the files and hosts in it."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from obdelta import __version__
from obdelta.cli.commands.setup.doctor import Findings, examine
from obdelta.cli.config_templates import (
    COMPOSE,
    OPTIONAL,
    Line,
    as_environment,
    as_helm_values,
    as_ini,
)
from obdelta.cli.options import OK, UNSATISFIED, USAGE, Commands, WrongUsage
from obdelta.cli.tables import printable

KINDS: Final = ("registry", "compose", "helm")
_FILES: Final = {"registry": "tap.conf", "compose": "obdelta.env", "helm": "values.yaml"}
_NEXT: Final = {
    "registry": "obdelta serve",
    "compose": "docker compose up -d delta",
    "helm": "helm upgrade openbalena ./helm -n openbalena --reuse-values -f values.yaml",
}


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "init",
        run,
        "write a first settings file, and check the files and hosts in it",
        "Asks for what is missing if it runs on a terminal. Never overwrites a file. Writes nothing"
        " if a setting\nis unusable; exits with 3 if the file is written, but a host in it does not"
        " answer.",
        [
            "obdelta init",
            "obdelta init --for registry --upstream https://registry.example.com \\",
            "    --public-url https://delta.example.com --auth none",
            "obdelta init --for compose --domain example.com",
        ],
    )
    parser.add_argument(
        "--for",
        dest="kind",
        choices=KINDS,
        help="registry: standalone; compose, helm: for openBalena",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the new file (default: tap.conf, obdelta.env or values.yaml)",
    )
    parser.add_argument("--upstream", metavar="URL", help="the registry, or oci:DIR")
    parser.add_argument("--public-url", metavar="URL", help="where devices reach this server")
    parser.add_argument(
        "--listen", metavar="ENDPOINT", help="where the server listens (default: tcp:8080)"
    )
    parser.add_argument(
        "--state-dir", metavar="DIR", help="for deltas and caches (default: /var/lib/obdelta)"
    )
    parser.add_argument(
        "--store-quota", metavar="SIZE", help="bytes for deltas and caches (default: 20 GiB)"
    )
    parser.add_argument(
        "--auth", choices=("token", "none"), help="token: clients need a token of the API"
    )
    parser.add_argument("--auth-key", metavar="FILE", help="the API's public key")
    parser.add_argument(
        "--domain", metavar="DOMAIN", help="openBalena's domain, such as example.com"
    )
    parser.add_argument(
        "--image", metavar="NAME", help="helm: obdelta's image (registry.example.com/obdelta:1.0)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Asks, checks, and writes the file."""
    kind = parsed.kind or _ask(
        "Which set-up? registry (standalone), compose (for openBalena's compose file) or helm (for"
        " open-balena-helm)",
        "--for",
        "registry",
        KINDS,
    )
    path = Path(parsed.output or _FILES[kind])
    if path.exists() or path.is_symlink():
        raise WrongUsage(f"{path} exists and is not overwritten: name another file with --output")
    if kind == "registry":
        lines = _of_registry(parsed)
        content, found = as_ini(lines), _checked(lines)
    else:
        content = _of_openbalena(parsed, kind)
        found = Findings([], list(_names(f"delta.{parsed.domain}", f"api.{parsed.domain}")))
    if found.errors:
        for line in found.errors:
            print(f"obdelta: {printable(line)}", file=sys.stderr)
        return USAGE
    _write(path, content)
    for line in found.warnings:
        print(f"warning: {printable(line)}")
    following = _NEXT[kind]
    if path.name != _FILES[kind] or path.parent != Path():
        following = following.replace(_FILES[kind], str(path))
        following += f" -c {path}" if kind == "registry" else ""
    print(f"{path} is written. Next: {following}")
    return UNSATISFIED if found.warnings else OK


def _of_registry(parsed: argparse.Namespace) -> list[Line]:
    upstream = parsed.upstream or _ask(
        "The registry that images come from (https://registry.example.com)", "--upstream"
    )
    public_url = parsed.public_url or _ask(
        "The URL by which devices will reach this server (https://delta.example.com)",
        "--public-url",
    )
    auth = parsed.auth or _ask(
        "Who may pull? token (clients with a token of the API), or none (all clients)",
        "--auth",
        "token",
        ("token", "none"),
    )
    lines = [
        Line("upstream", "The registry that images come from.", upstream),
        Line(
            "public-url",
            "The URL by which devices reach this server; delta image names contain its host.",
            public_url,
        ),
        Line(
            "listen",
            "Where the server listens for devices: a Twisted endpoint.",
            parsed.listen or "tcp:8080",
        ),
        Line(
            "state-dir",
            "The directory for deltas, caches and the catalogue.",
            str(Path(parsed.state_dir or "/var/lib/obdelta").absolute()),
        ),
    ]
    if auth == "none":
        lines += [
            Line("auth", "none: everyone may pull what this server may pull.", "none"),
            Line("upstream-credentials", "none: the registry is open.", "none"),
        ]
    else:
        key = parsed.auth_key or _ask(
            "The API's public key or certificate, a PEM file", "--auth-key"
        )
        domain = parsed.domain or _ask("openBalena's domain (example.com)", "--domain")
        lines += [
            Line(
                "auth-key",
                "The API's public key, which verifies tokens.",
                str(Path(key).absolute()),
            ),
            Line("auth-issuer", "Who issues tokens: the claim iss.", f"api.{domain}"),
            Line("auth-audience", "For whom tokens are: the claim aud.", f"registry2.{domain}"),
            Line("auth-realm", "Where clients get tokens.", f"https://api.{domain}/auth/v1/token"),
        ]
    return [
        *lines,
        *(
            replace(line, value=parsed.store_quota) if line.key == "store-quota" else line
            for line in OPTIONAL
        ),
    ]


def _of_openbalena(parsed: argparse.Namespace, kind: str) -> str:
    parsed.domain = parsed.domain or _ask("openBalena's domain (example.com)", "--domain")
    if kind == "compose":
        return as_environment(COMPOSE)
    image = parsed.image or _ask(
        f"obdelta's image in the cluster's registry (registry.example.com/obdelta:{__version__})",
        "--image",
    )
    repository, colon, tag = image.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = image, __version__
    return as_helm_values(repository, tag)


def _checked(lines: list[Line]) -> Findings:
    """Returns what is wrong with the settings that the file will have."""
    given = {line.key: line.value for line in lines if line.value is not None}
    found = examine(given, None, discover=False)
    if found.errors:
        return found
    hosts = [urlsplit(given["public-url"]).hostname or ""]
    if not given["upstream"].startswith("oci:"):
        hosts.append(urlsplit(given["upstream"]).hostname or "")
    return Findings([], [*_names(*hosts), *found.warnings])


def _names(*hosts: str) -> Iterator[str]:
    for host in dict.fromkeys(hosts):
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            yield (
                f"the name {host} cannot be resolved here: {error.strerror}: correct it, or add it"
                " to the DNS"
            )


def _ask(question: str, option: str, default: str = "", allowed: tuple[str, ...] = ()) -> str:
    """Returns the answer on the terminal. Raises WrongUsage if there is none."""
    if not sys.stdin.isatty():
        raise WrongUsage(f"{option} is missing, and there is no terminal to ask: give it")
    while True:
        print(
            f"{question}{f' [{default}]' if default else ''}: ", end="", file=sys.stderr, flush=True
        )
        line = sys.stdin.readline()
        if not line:
            raise WrongUsage(f"{option} is missing: the input ended")
        answer = line.strip() or default
        if answer and (not allowed or answer in allowed):
            return answer


def _write(path: Path, content: str) -> None:
    """Writes a new file, which nothing else has made meanwhile, and its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError as error:
        raise WrongUsage(
            f"{path} exists and is not overwritten: name another file with --output"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
