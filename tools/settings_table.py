"""Writes the tables of docs/settings.md: ``python -m tools.settings_table [--check]``.

Writes the sections with all settings in docs/settings.md from obdelta.settings. With --check
nothing is written, and the exit status is 1 when the page is out of date.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from obdelta.settings import Setting, all_rows, table
from obdelta.settings.build_settings import (
    BuilderSettings,
    BuildSettings,
    PublishSettings,
    StorageSettings,
    V2Settings,
)
from obdelta.settings.fleet_settings import FleetSettings
from obdelta.settings.schema import SECTIONS
from obdelta.settings.server_settings import (
    AccessSettings,
    AddressSettings,
    LimitSettings,
    OperatorSettings,
    ReplicaSettings,
    TlsSettings,
    UpstreamSettings,
)

PAGE = Path(__file__).parent.parent / "docs/settings.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end of settings -->\n"
OLD_NAMES = """\
Old keys and their variables still work, and the log names them at the start.
If both names are given, the server does not start.
Other settings of earlier versions do not prevent a start either.
For each of them, a line in the log says whether it still has an effect, and what replaces it."""

HEADINGS: dict[type, tuple[str, str]] = {
    UpstreamSettings: (
        "Upstream registry",
        "All images come from one registry, the [upstream](upstream.md).",
    ),
    AddressSettings: (
        "Addresses and state",
        "These settings define where the server listens and where it keeps its files.",
    ),
    AccessSettings: (
        "Access tokens",
        "The server verifies the tokens of devices with these values ([access](access.md)).",
    ),
    TlsSettings: (
        "TLS and proxies",
        "The page on [TLS](tls.md) has examples with and without a proxy.",
    ),
    OperatorSettings: (
        "Operators and logs",
        "The page for [operators](operators.md) describes metrics, the status page and the log.",
    ),
    ReplicaSettings: (
        "Processes and replicas",
        "A server can use several processes, and several machines can share work"
        " ([scaling](scaling.md)).",
    ),
    LimitSettings: (
        "Limits for clients",
        "The server limits what one client may use at a time ([limits](access.md#limits)).\n"
        "The value 0 means no limit.",
    ),
    BuildSettings: (
        "Builds",
        "These settings apply to builds of v2 and v3 deltas.\n"
        "`effort`, `device-link` and `delta-compression` apply only to v3.",
    ),
    BuilderSettings: (
        "Builders",
        "A v3 delta is built by obdelta itself or by a balena-engine ([builders](builders.md)).",
    ),
    PublishSettings: (
        "Publishing",
        "Devices pull v3 deltas from this server or from the registry"
        " ([publishing](publishing.md)).",
    ),
    V2Settings: ("v2 deltas", "Older supervisors get rsync batches ([v2](v2.md))."),
    StorageSettings: (
        "Storage",
        "The server keeps deltas and caches within a quota"
        " ([state](state.md#caches-and-the-quota)).",
    ),
    FleetSettings: (
        "Fleet",
        "With openBalena's API the server knows releases and devices, and builds deltas before"
        " devices ask ([fleet](fleet.md)).",
    ),
}
"""The heading of each section, and a sentence about it."""


def sentences(text: str) -> str:
    """Returns a help text with a sentence and a line for each part between semicolons."""
    parts = re.split(r"; (?![^(]*\))", text)
    return "\n".join(f"{part[0].upper()}{part[1:]}." for part in parts)


def entry(setting: Setting) -> str:
    """Returns the setting's own section, to which other pages link by its key."""
    names = ", ".join(f"`{name}`" for name in setting.environment)
    default = setting.derived_help or setting.default_help
    meaning = sentences(setting.help_text)
    return f"### `{setting.key}`\n\n{meaning}\n\n- Default: {default}\n- Environment: {names}\n"


def sections() -> str:
    """Returns all settings: for each group a heading and a sentence; for each setting a section."""
    documented = {setting.field: setting for setting in table()}
    parts = []
    for section in SECTIONS:
        title, about = HEADINGS[section]
        names = [field.name for field in dataclasses.fields(section)]
        entries = [entry(documented[name]) for name in names if name in documented]
        parts.append("\n".join([f"## {title}\n\n{about}\n", *entries]))
    return "\n".join(parts)


def overview() -> str:
    """Returns the keys of each group, linked to their sections."""
    documented = {setting.field: setting.key for setting in table()}
    lines = []
    for section in SECTIONS:
        title, _ = HEADINGS[section]
        keys = [documented.get(field.name) for field in dataclasses.fields(section)]
        links = ", ".join(f"[`{key}`](#{key})" for key in keys if key)
        anchor = title.lower().replace(" ", "-")
        lines.append(f"- [{title}](#{anchor}): {links}\n")
    return "## All settings\n\n" + "".join(lines)


def old_names() -> str:
    """Returns the table of renamed settings."""
    rows = "".join(
        f"| `{setting.old_key}` | [`{setting.key}`](#{setting.key}) |\n"
        for setting in table()
        if setting.old_key
    )
    superseded = ", ".join(f"`{row.key}`" for row in all_rows() if row.superseded)
    return (
        f"## Old names\n\n{OLD_NAMES}\nThese old settings still have an effect: {superseded}.\n\n"
        f"| old key | key |\n|---|---|\n{rows}"
    )


def main() -> int:
    old = PAGE.read_text("utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.stderr.write(f"docs/settings.md has no lines {BEGIN.strip()} and {END.strip()}\n")
        return 1
    new = f"{before}{BEGIN}\n{overview()}\n{sections()}\n{old_names()}\n{END}{after}"
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
