"""The settings: ``tap.conf``, environment and long options to one frozen object
(``docs/settings.md``).

Each setting is one annotated field of :class:`Settings`. Options, environment names, the file's
keys, ``obdelta settings`` and the table in the documentation all come from these fields.

Where several sources give a value, the order is: option, environment, file, openBalena's own
environment (``BALENA_TLD``, ``REGISTRY_HOST``, ``DELTA_HOST``), default. An empty value counts as
not given.
"""

from obdelta.settings.address_parsers import OciLayouts, RedisUrl, RegistryUrl, Upstream
from obdelta.settings.config_file import find_file
from obdelta.settings.schema import Settings, all_rows, old_keys, table
from obdelta.settings.setting import Setting
from obdelta.settings.sources import read

__all__ = [
    "OciLayouts",
    "RedisUrl",
    "RegistryUrl",
    "Setting",
    "Settings",
    "Upstream",
    "all_rows",
    "find_file",
    "old_keys",
    "read",
    "table",
]
