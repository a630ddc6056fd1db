"""All settings in one object, and the table of them.

To add a setting, add a field to a section in ``server_settings.py``, ``build_settings.py``
or ``fleet_settings.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from obdelta.settings.address_parsers import url_host
from obdelta.settings.build_settings import (
    BuilderSettings,
    BuildSettings,
    PublishSettings,
    StorageSettings,
    V2Settings,
)
from obdelta.settings.fleet_settings import FleetSettings
from obdelta.settings.server_settings import (
    AccessSettings,
    AddressSettings,
    LimitSettings,
    OperatorSettings,
    ReplicaSettings,
    TlsSettings,
    UpstreamSettings,
)
from obdelta.settings.setting import ROW, Setting

UNUSED: Final[Mapping[str, str]] = {
    "layer-cache": "caches share store-quota",
    "tree-cache": "caches share store-quota",
    "blob-cache": "caches share store-quota",
    "delta-cache": "deltas share store-quota with the caches",
    "max-layer": "max-image limits layers, too",
    "max-queue": "the build queue has a fixed limit",
    "failure-memory": "a failure is remembered for ten minutes",
    "shared-lease": "leases last 20 seconds",
    "v2-filling": "a tenth of a batch may be padding",
}
"""Keys of earlier versions that no longer have an effect, and why."""


@dataclass(frozen=True, kw_only=True)
class Settings(
    UpstreamSettings,
    AddressSettings,
    AccessSettings,
    TlsSettings,
    OperatorSettings,
    ReplicaSettings,
    LimitSettings,
    BuildSettings,
    BuilderSettings,
    PublishSettings,
    V2Settings,
    StorageSettings,
    FleetSettings,
):
    """The effective settings. Sizes in bytes, times in seconds, absolute paths. ``repr`` shows no
    secret.
    """

    origins: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """The source of each key's value: ``option``, ``environment NAME``, ``file``, ``derived``,
    ``default``.
    """
    texts: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Each key's value as written, with secrets masked. A key without a value is missing."""
    notices: tuple[str, ...] = dataclasses.field(repr=False, compare=False)
    """One line for each old key that was given."""

    @property
    def public_host(self) -> str:
        """Returns ``host[:port]`` of ``public_url`` for image names, without
        the scheme's own port.
        """
        return url_host(self.public_url)

    @property
    def image_hosts(self) -> frozenset[str]:
        """Returns the hosts in names of images that mean the upstream registry, or this server."""
        return self.registry_hosts | {self.public_host}


SECTIONS: Final[tuple[type[Any], ...]] = Settings.__bases__
"""In the order in which settings are documented and derived."""


def _rows() -> Iterator[Setting]:
    for section in SECTIONS:
        for field in dataclasses.fields(section):
            yield dataclasses.replace(field.metadata[ROW], key=field.name.replace("_", "-"))


_ROWS: Final = tuple(_rows())


def all_rows() -> tuple[Setting, ...]:
    """Returns all settings, also superseded ones, in the order in which they are derived."""
    return _ROWS


def table() -> tuple[Setting, ...]:
    """Returns the documented settings, in the order in which they are documented and derived."""
    return tuple(row for row in _ROWS if not row.superseded)


def old_keys() -> tuple[str, ...]:
    """Returns the undocumented keys that are still read: former names, superseded and unused."""
    old_key = [row.old_key for row in _ROWS if row.old_key]
    return (*old_key, *(row.key for row in _ROWS if row.superseded), *UNUSED)
