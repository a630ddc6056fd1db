"""usage: python -m tools.settings_table [--check]

Writes the sections with all settings in docs/settings.md from obdelta.settings. With --check
nothing is written, and the exit status is 1 when the page is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from obdelta.settings import Setting, table

PAGE = Path(__file__).parent.parent / "docs/settings.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end of settings -->\n"
HEAD = "| key | environment | default | meaning |\n|---|---|---|---|\n"


class Section(NamedTuple):
    """A heading of the page. ``keys``: the settings under it, separated by blanks."""

    title: str
    about: str
    keys: str


SECTIONS = (
    Section(
        "Addresses and state",
        "These settings define where the server listens and where it keeps its files.",
        "listen public-url registry-hosts state-dir",
    ),
    Section(
        "Upstream",
        "All images come from one registry, the [upstream](upstream.md).",
        "upstream upstream-ca upstream-redirects upstream-credentials builder-token upstream-basic"
        " token-realms",
    ),
    Section(
        "Access tokens",
        "The server verifies the tokens of devices with these values ([access](access.md)).",
        "auth auth-key jwt-algorithm auth-issuer auth-audience auth-realm auth-service pull-grace",
    ),
    Section(
        "TLS and proxies",
        "The page on [TLS](tls.md) has examples with and without a proxy.",
        "tls-certificate tls-key proxy-protocol proxy-from",
    ),
    Section(
        "Operators and logs",
        "The page for [operators](operators.md) describes metrics, the status page and the log.",
        "operator-listen operator-hosts log-level log-format",
    ),
    Section(
        "Processes and replicas",
        "A server can use several processes, and several machines can share work"
        " ([scaling](scaling.md)).",
        "processes shared shared-ca shared-lease",
    ),
    Section(
        "Limits for clients",
        "The server limits what one client may use at a time ([limits](access.md#limits)).\n"
        "The value 0 means no limit.",
        "max-connections max-requests max-queued-builds max-queue max-builder-requests",
    ),
    Section(
        "Builds",
        "These settings apply to builds of v2 and v3 deltas; `effort` only to v3.",
        "hold max-builds effort worth max-layer max-image worker-memory build-timeout"
        " failure-memory drain",
    ),
    Section(
        "Builders",
        "A v3 delta is built by obdelta itself or by a balena-engine ([builders](builders.md)).",
        "builder docker-host docker-tls-verify docker-cert-path",
    ),
    Section(
        "Publishing",
        "Devices pull v3 deltas from this server or from the registry"
        " ([publishing](publishing.md)).",
        "publish publish-host",
    ),
    Section(
        "v2 deltas",
        "Older supervisors get rsync batches ([v2](v2.md)).",
        "v2-streaming v2-filling v2-url-lifetime v2-full-pull delta-rsync",
    ),
    Section(
        "Storage",
        "The server keeps deltas and caches within a quota"
        " ([state](state.md#caches-and-the-quota)).",
        "store-quota layer-cache tree-cache blob-cache delta-cache grace",
    ),
)


def section_of(key: str) -> Section:
    """Returns the section that holds a setting; ValueError unless exactly one does."""
    found = [section for section in SECTIONS if key in section.keys.split()]
    if len(found) != 1:
        raise ValueError(f"setting {key} is in {len(found)} sections: put it into one of SECTIONS")
    return found[0]


def row(setting: Setting) -> str:
    """The setting's row of its table."""
    names = ", ".join(f"`{name}`" for name in setting.environment)
    default = setting.derive_shown or setting.default_shown
    return f"| `{setting.key}` | {names} | {default} | {setting.meaning} |\n"


def sections() -> str:
    """All settings: a heading, a sentence and a table for each section."""
    rows = {setting.key: row(setting) for setting in table() if section_of(setting.key)}
    parts = [
        f"## {title}\n\n{about}\n\n{HEAD}{''.join(rows[key] for key in keys.split())}"
        for title, about, keys in SECTIONS
    ]
    return "\n".join(parts)


def main() -> int:
    old = PAGE.read_text("utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.stderr.write(f"docs/settings.md has no lines {BEGIN.strip()} and {END.strip()}\n")
        return 1
    new = f"{before}{BEGIN}\n{sections()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if new != old:
            sys.stderr.write(
                "docs/settings.md is out of date: run .venv/bin/python -m tools.settings_table\n"
            )
        return int(new != old)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
