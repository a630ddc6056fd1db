"""Checks of settings before a start: errors that would prevent it, and warnings about valid
settings that are probably wrong. They neither listen nor write.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

from cryptography import x509

from obdelta.app.access import make_access, make_certificates, push_target
from obdelta.app.builders import engine_target
from obdelta.app.fleet import fleet_credentials
from obdelta.concurrency.reactor import IReactor
from obdelta.errors import SettingsError
from obdelta.net.certificates import SOON
from obdelta.net.client_address import TrustedProxies
from obdelta.net.listen import parse_endpoint
from obdelta.registry.http.tls import read_bundle
from obdelta.settings import OciLayouts, Settings
from obdelta.store import ownership
from obdelta.web.operators.passwords import PasswordFile

_ANY_PORT: Final = re.compile(r"tcp6?:(port=)?0(:|\Z)")
SMALL_QUOTA: Final = 1 << 20
"""Bytes below which a quota is probably one whose unit is missing."""
_UNUSED: Final = cast(IReactor, object())
"""Endpoints keep their reactor until they listen, which these never do."""


@dataclass(frozen=True, slots=True)
class SetupWarning:
    """A valid setting that is probably wrong, and one line with the reason and a remedy."""

    key: str
    text: str


def start_errors(configured: Settings) -> list[SettingsError]:
    """Returns the errors with which a server with these settings would not start."""
    layers = configured.tls_certificate is not None or configured.proxy_protocol

    def endpoints() -> None:
        for text in configured.listen:
            parse_endpoint(text, _UNUSED, layers=layers)
        for text in configured.operator_listen:
            parse_endpoint(text, _UNUSED, setting="operator-listen")
            if text in configured.listen and not _ANY_PORT.match(text):
                raise SettingsError(
                    "operator-listen", text, "another port than listen has: devices must not act"
                )

    checks: list[Callable[[], object]] = [
        lambda: make_access(configured),
        lambda: TrustedProxies(configured.proxy_from.networks),
        lambda: make_certificates(configured, time.time),
        lambda: configured.upstream_ca and read_bundle(configured.upstream_ca),
        lambda: engine_target(configured),
        endpoints,
        lambda: push_target(configured),
        lambda: fleet_credentials(configured),
        lambda: (
            configured.operator_passwords and PasswordFile(configured.operator_passwords, time.time)
        ),
        lambda: ownership.check(configured.state_dir),
    ]
    errors: list[SettingsError] = []
    for check in checks:
        try:
            check()
        except SettingsError as error:
            errors += error.each
        except OSError as error:
            errors.append(
                SettingsError(
                    "state-dir",
                    str(configured.state_dir),
                    f"a readable directory ({error.strerror})",
                )
            )
    return errors


def setup_warnings(configured: Settings) -> Iterator[SetupWarning]:
    """Yields the warnings for settings without start errors."""
    yield from _certificates(configured)
    yield from _exposure(configured)
    yield from _storage(configured)
    yield from _readable_secrets(configured)
    if isinstance(configured.upstream, OciLayouts) and not configured.upstream.path.is_dir():
        yield SetupWarning(
            "upstream",
            f"{configured.upstream.path} is no directory: there are no images to serve: create it,"
            " or correct the path",
        )
    if shutil.which("rsync") is None:
        yield SetupWarning(
            "delta-rsync", "rsync is not installed: v2 deltas cannot be made: install it"
        )


def _certificates(configured: Settings) -> Iterator[SetupWarning]:
    host = urlsplit(configured.public_url).hostname or ""
    tls = make_certificates(configured, time.time)
    if tls is not None:
        if configured.public_url.startswith("http:"):
            yield SetupWarning(
                "public-url",
                "it is http, but listen has a certificate: devices would send plain HTTP: write"
                " https, or remove tls-certificate",
            )
        elif not tls.covers(host):
            yield SetupWarning(
                "tls-certificate",
                f"no certificate covers {host}, the host of public-url: devices will refuse it: get"
                " one for this name, or correct public-url",
            )
        for file, seconds in tls.expiries().items():
            yield from _expiry("tls-certificate", file, datetime.fromtimestamp(seconds, UTC))
    if configured.auth == "token" and isinstance(configured.auth_key, Path):
        try:
            keys = x509.load_pem_x509_certificates(configured.auth_key.read_bytes())
        except (ValueError, OSError):
            keys = []  # a bare public key, which does not expire
        for key in keys[:1]:
            yield from _expiry("auth-key", str(configured.auth_key), key.not_valid_after_utc)


def _expiry(key: str, file: str, end: datetime) -> Iterator[SetupWarning]:
    now = datetime.now(UTC)
    if end <= now:
        yield SetupWarning(key, f"{file} expired on {end:%Y-%m-%d}: renew it")
    elif end - now < timedelta(seconds=SOON):
        yield SetupWarning(key, f"{file} expires on {end:%Y-%m-%d}: renew it")


def _exposure(configured: Settings) -> Iterator[SetupWarning]:
    for text in configured.operator_listen:
        if not is_local(text):
            yield SetupWarning(
                "operator-listen",
                f"{text} is open beyond this machine: everyone who reaches it sees images and"
                " builds: add interface=127.0.0.1, or keep devices out of that network",
            )
    if configured.auth == "none":
        for text in configured.listen:
            if not is_local(text):
                yield SetupWarning(
                    "auth",
                    f"it is none, and {text} is open beyond this machine: everyone who reaches it"
                    " may pull everything that this server may pull: set auth = token, or add"
                    " interface=127.0.0.1",
                )


def is_local(endpoint: str) -> bool:
    """Returns whether an endpoint string is reachable on this machine only, as far as that can be
    read from it.
    """
    kind, _, rest = endpoint.partition(":")
    if kind not in ("tcp", "tcp6", "ssl"):
        return kind == "unix"
    for part in rest.replace("\\:", "\0").split(":"):
        if part.startswith("interface="):
            interface = part.partition("=")[2].replace("\0", ":")
            if interface == "localhost":
                return True
            try:
                return ip_address(interface).is_loopback
            except ValueError:
                return False
    return False


def readable_by_all(path: Path) -> bool:
    """Returns whether the mode of a file lets every user of this machine read it; False for a file
    that is missing.
    """
    try:
        return bool(path.stat().st_mode & 0o004)
    except OSError:
        return False


def _readable_secrets(configured: Settings) -> Iterator[SetupWarning]:
    for key, path in secret_files(configured):
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for what may not be read
            yield SetupWarning(key, f"{path} is a directory, and should be a file: {_remedy(key)}")
        elif readable_by_all(path):
            yield SetupWarning(
                key,
                f"all users of this machine can read {path}, which has secrets: chmod 640 it, and"
                " give it the server's group",
            )


def _remedy(key: str) -> str:
    if key == "state-dir":
        return "remove it: the server writes this file itself"
    return (
        "remove it, and put the file there (Docker makes a directory where a file to mount is"
        " missing)"
    )


def secret_files(configured: Settings) -> Iterator[tuple[str, Path]]:
    """Yields the files with secrets that the server reads, each with the setting that leads to it.
    Some may be missing.
    """
    if configured.operator_passwords is not None:
        yield "operator-passwords", configured.operator_passwords
    if isinstance(configured.api_token, Path):
        yield "api-token", configured.api_token
    for path in configured.tls_key or ():
        yield "tls-key", path
    if configured.tls_key is None:
        # Each key is in its certificate's file.
        for path in configured.tls_certificate or ():
            yield "tls-certificate", path
    if configured.docker_cert_path is not None:
        yield "docker-cert-path", configured.docker_cert_path / "key.pem"
    for name in ("operator-key", "url-key"):
        yield "state-dir", configured.state_dir / name


def _storage(configured: Settings) -> Iterator[SetupWarning]:
    quota, folder = configured.store_quota, configured.state_dir
    if quota == 0:
        yield SetupWarning(
            "store-quota",
            "it is 0: nothing is kept, and every request builds its delta again:"
            " give it a size, such as 20 GiB",
        )
    elif quota < SMALL_QUOTA:
        yield SetupWarning(
            "store-quota",
            f"it is {quota:,} bytes, less than most deltas have: give it a unit, such as 20 GiB",
        )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < quota and free + _used(folder) < quota:
        yield SetupWarning(
            "store-quota",
            f"it is {quota:,} bytes, but the disk of {folder} has {free:,} bytes free: the disk"
            " fills before the quota counts: lower store-quota, or use a larger disk",
        )


def _used(folder: Path) -> int:
    """Returns the bytes that the files of a directory occupy."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(path, name)).st_blocks * 512
            except OSError:
                continue  # it was removed meanwhile
    return total
