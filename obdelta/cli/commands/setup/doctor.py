"""``obdelta doctor``: checks settings, and the files and hosts in them, without a start."""

from __future__ import annotations

import argparse
import json
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from obdelta import settings
from obdelta.cli.options import (
    OK,
    UNSATISFIED,
    USAGE,
    Commands,
    add_json,
    add_setting_options,
    given_settings,
)
from obdelta.cli.tables import printable
from obdelta.errors import ObdeltaError, SettingsError
from obdelta.settings import RegistryUrl, Settings
from obdelta.settings.config_file import ConfigFile, read_file

if TYPE_CHECKING:
    from obdelta.app.setup_checks import SetupWarning

_SECONDS: Final = 10.0
"""Seconds that a probe waits for an answer."""
_SKEW: Final = 30.0
"""Seconds between two clocks from which on there is a warning. Tokens allow for 60."""


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "doctor",
        run,
        "check the settings, and the files and hosts in them",
        "Displays all errors that would prevent a start, with file and line, and warnings for valid"
        " settings that are\nprobably wrong. Connects to the upstream and to public-url. Exits with"
        " 2 for errors, 3 for warnings.",
        ["obdelta doctor", "obdelta doctor -c tap.conf --json"],
    )
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Checks, and prints errors and warnings."""
    found = examine(given_settings(parsed), parsed.config)
    if parsed.json:
        print(json.dumps({"errors": found.errors, "warnings": found.warnings}))
    else:
        print(found.text())
    return found.status


@dataclass(frozen=True, slots=True)
class Findings:
    """Errors, which prevent a start, and warnings: one line each."""

    errors: list[str]
    warnings: list[str]

    @property
    def status(self) -> int:
        """Returns the exit status."""
        return USAGE if self.errors else UNSATISFIED if self.warnings else OK

    def text(self) -> str:
        """Returns a line for each, and their numbers."""
        lines = [f"error: {printable(line)}" for line in self.errors]
        lines += [f"warning: {printable(line)}" for line in self.warnings]
        counts = [_counted(self.errors, "error"), _counted(self.warnings, "warning")]
        return "\n".join([*lines, ", ".join(counts)])


def _counted(lines: list[str], what: str) -> str:
    return f"{len(lines)} {what}{'' if len(lines) == 1 else 's'}"


def examine(options: Mapping[str, str], config: str | None, *, discover: bool = True) -> Findings:
    """Returns what is wrong with the settings of these options, the environment and the file.

    Connects to the upstream and to ``public-url``. Without ``discover``, only the options are read.
    """
    from obdelta.app.setup_checks import setup_warnings, start_errors

    try:
        file = settings.find_file(config, os.environ) if discover else None
        configured = settings.read(options, os.environ if discover else {}, file)
        content = read_file(file) if file is not None else ConfigFile()
    except SettingsError as error:
        return Findings([str(each) for each in error.each], [])
    errors = start_errors(configured)
    if errors:
        return Findings([_with_place(each, configured, content) for each in errors], [])
    warnings = [*setup_warnings(configured), *probes(configured)]
    return Findings(
        [],
        [
            *(
                f"{each.key} ({_place(each.key, configured, content)}): {each.text}"
                if discover
                else f"{each.key}: {each.text}"
                for each in warnings
            ),
            *configured.notices,
            *_readable_secret(configured, content),
        ],
    )


def _with_place(error: SettingsError, configured: Settings, content: ConfigFile) -> str:
    if configured.origins.get(error.key, "default") == "default":
        return str(error)
    return f"{error} (from {_place(error.key, configured, content)})"


def _place(key: str, configured: Settings, content: ConfigFile) -> str:
    origin = configured.origins[key]
    return content.place(key) if origin == "file" else origin


def _readable_secret(configured: Settings, content: ConfigFile) -> Iterator[str]:
    from obdelta.app.setup_checks import readable_by_all

    for row in settings.table():
        if row.secret and content.path is not None and content.values.get(row.key):
            if isinstance(getattr(configured, row.field), Path):
                continue  # the value is the path of a file, which is checked itself
            if readable_by_all(content.path):
                yield (
                    f"{row.key} ({content.place(row.key)}): all users of this machine can read"
                    f" {content.path}: chmod 640 it, or use {row.environment[0]}"
                )


def probes(configured: Settings) -> Iterator[SetupWarning]:
    """Connects to the upstream and to ``public-url``, and yields what does not answer."""
    if isinstance(configured.upstream, RegistryUrl):
        yield from _upstream(configured.upstream.url, configured.upstream_ca)
    if configured.public_url.startswith("https:") and configured.tls_certificate is None:
        yield from _public_url(configured)


def _upstream(url: str, ca: Path | None) -> Iterator[SetupWarning]:
    from obdelta.app.setup_checks import SetupWarning
    from obdelta.device.http import Http

    tls = None
    with suppress(OSError):  # of an authority that is unusable there is an error already
        tls = ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    try:
        with Http(tls=tls, timeout=_SECONDS).request("GET", f"{url}/v2/") as answer:
            before = time.time()
            if answer.status not in (200, 401):
                yield SetupWarning(
                    "upstream",
                    f"{url}/v2/ answered {answer.status}: it is no registry, or refuses this"
                    " machine: check the URL, and what a proxy in between allows",
                )
            with suppress(KeyError, ValueError):
                ahead = before - parsedate_to_datetime(answer.headers["date"]).timestamp()
                side = "ahead of" if ahead > 0 else "behind"
                if abs(ahead) > _SKEW:
                    yield SetupWarning(
                        "upstream",
                        f"the clock here is {abs(ahead):.0f} s {side} that of {url}: tokens would"
                        " count as expired or not yet valid: set the clock",
                    )
    except ObdeltaError as error:
        why = _why(error)
        yield SetupWarning("upstream", f"{url} cannot be reached: {why}: {_remedy(why)}")


def _public_url(configured: Settings) -> Iterator[SetupWarning]:
    """Checks that something ends TLS at ``public-url``, since this server does not."""
    from obdelta.app.setup_checks import SetupWarning
    from obdelta.device.http import Http

    try:
        with Http(timeout=_SECONDS).request("GET", f"{configured.public_url}/healthz"):
            return
    except ObdeltaError as error:
        yield SetupWarning(
            "public-url",
            f"it is https, but listen has no certificate, and no proxy ends TLS at"
            f" {configured.public_url}: {_why(error)}: set tls-certificate, or configure the proxy",
        )


def _why(error: ObdeltaError) -> str:
    """Returns the reason alone, without the address, numbers of errors, and places in Python."""
    why = re.sub(r"^failed at \S+: ", "", str(getattr(error, "why", error)))
    return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", why)


_REMEDIES: Final = {
    "certificate has expired": "renew the registry's certificate, or set this machine's clock",
    "certificate is not yet valid": "set this machine's clock",
    "is not valid for": "use a name in upstream that the certificate contains",
    "certificate verify failed": "name the registry's authority in upstream-ca if you trust it",
    "wrong version number": "the registry serves no TLS there: write http, or correct the port",
    "Name or service not known": "correct the name, or this machine's DNS",
    "name resolution": "check this machine's DNS, or try again",
    "did not answer in time": "check the network and firewalls up to the registry",
}
"""Remedies, by words in the reason. The first one counts."""


def _remedy(why: str) -> str:
    found = (remedy for words, remedy in _REMEDIES.items() if words in why)
    return next(found, "check that the registry runs, and the URL")
