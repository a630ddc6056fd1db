"""The settings: ``tap.conf``, environment and long options to one frozen object (``docs/settings.md``).

Each setting is one annotated field of :class:`Settings`, made by :func:`setting`; options, environment names, the file's
keys, ``obdelta settings`` and the table in the documentation all come from these fields. To add a setting, add a field.

Where several places give a value: option, then environment, then file, then what openBalena's own environment
(``BALENA_TLD``, ``REGISTRY_HOST``, ``DELTA_HOST``) leads to, then the default. An empty value counts as not given.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obdelta import setting_values as values
from obdelta.errors import SettingsError
from obdelta.setting_values import OciLayouts, RegistryUrl, Upstream, url_host

SECTION: Final = "obdelta"
PREFIX: Final = "OBDELTA_"
MASK: Final = "***"
_SECRET_NAME = re.compile(r"token|secret|password|key|credential", re.IGNORECASE)

__all__ = ["MASK", "OciLayouts", "RegistryUrl", "Setting", "Settings", "Upstream", "read", "setting", "table"]


@dataclass(frozen=True, slots=True)
class Given:
    """What a derived default may look at: the environment, and the settings that stand above it in the table."""

    environment: Mapping[str, str]
    values: Mapping[str, Any]

    def env(self, name: str) -> str:
        """The variable's value without blanks around it, ``""`` where it is not set."""
        return self.environment.get(name, "").strip()


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. ``parse`` raises ValueError; ``expected`` is what an error then says was expected."""

    key: str
    parse: Callable[[str], Any]
    expected: str
    meaning: str
    default: str | None
    default_shown: str
    derive: Callable[[Given], str | None] | None
    derive_shown: str
    also: tuple[str, ...]
    required: bool
    secret: bool

    @property
    def field(self) -> str:
        """The attribute of :class:`Settings`."""
        return self.key.replace("-", "_")

    @property
    def environment(self) -> tuple[str, ...]:
        """The variables that give it, the strongest first."""
        return (PREFIX + self.field.upper(), *self.also)


def setting(
    parse: Callable[[str], Any],
    expected: str,
    meaning: str,
    *,
    default: str | None = None,
    default_shown: str | None = None,
    derive: Callable[[Given], str | None] | None = None,
    derive_shown: str = "",
    also: tuple[str, ...] = (),
    required: bool = False,
    secret: bool = False,
) -> Any:
    """A field of :class:`Settings`; its key is the field's name with hyphens.

    ``also`` names further variables that hold the value itself. ``derive`` makes a default of what else is known;
    ``derive_shown`` and ``default_shown`` are how the documentation tells it. Without any value a field is None, or,
    when ``required``, the start stops.
    """
    shown = default_shown if default_shown is not None else (f"`{default}`" if default is not None else "none")
    row = ("", parse, expected, meaning, default, shown, derive, derive_shown, also, required, secret)
    return dataclasses.field(repr=not secret, metadata={SECTION: row})


def _upstream_of_openbalena(given: Given) -> str | None:
    if registry := given.env("REGISTRY_HOST"):
        return f"https://{registry}"
    if tld := given.env("BALENA_TLD"):
        return f"https://registry2.{tld}"
    return None


def _public_url_of_openbalena(given: Given) -> str | None:
    if host := given.env("DELTA_HOST"):
        return f"https://{host}"
    if tld := given.env("BALENA_TLD"):
        return f"https://delta.{tld}"
    return None


def _hosts_of_openbalena(given: Given) -> str | None:
    found = []
    if isinstance(given.values["upstream"], RegistryUrl):
        found.append(given.values["upstream"].host)
    if registry := given.env("REGISTRY_HOST"):
        found.append(registry)
    if tld := given.env("BALENA_TLD"):
        found += [f"registry.{tld}", f"registry2.{tld}"]
    return " ".join(dict.fromkeys(found)) or url_host(given.values["public_url"])


def _cores(_given: Given) -> str:
    return str(len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Sizes in bytes, times in seconds, paths absolute; ``repr`` shows no secret."""

    listen: tuple[str, ...] = setting(
        values.lines, "Twisted server endpoint strings, one a line", "Twisted server endpoint strings, one a line",
        default="tcp:8080",
    )  # fmt: skip
    upstream: Upstream = setting(
        values.upstream,
        "the URL of a registry (https://registry.example.com) or oci:DIR",
        "URL of the registry, or `oci:DIR`: a folder of OCI image layouts (the embedded upstream)",
        derive=_upstream_of_openbalena,
        derive_shown="`https://$REGISTRY_HOST`, else `https://registry2.$BALENA_TLD`",
        required=True,
    )
    upstream_ca: Path | None = setting(
        values.path, "the path of a PEM bundle", "PEM bundle that signs the upstream", default_shown="the system's"
    )
    public_url: str = setting(
        values.url,
        "the URL by which devices reach this server, without a path (https://delta.example.com)",
        "how devices reach us; its host:port goes into delta image names",
        derive=_public_url_of_openbalena,
        derive_shown="`https://$DELTA_HOST`, else `https://delta.$BALENA_TLD`",
        required=True,
    )
    registry_hosts: frozenset[str] = setting(
        values.hosts,
        "host names, with :port where it is not the scheme's own, separated by blanks or commas",
        "names under which images may be referred to in `src` and `dest`; any other is refused "
        "(the host that a client names is never connected to)",
        derive=_hosts_of_openbalena,
        derive_shown="the host of `upstream` (of `public-url` when that is `oci:DIR`), `$REGISTRY_HOST`, "
        "`registry.$BALENA_TLD`, `registry2.$BALENA_TLD`",
    )
    state_dir: Path = setting(
        values.path, "the path of a folder", "everything that is kept", default="/var/lib/obdelta"
    )
    upstream_credentials: str = setting(
        values.choice("device", "builder", "none"),
        "device, builder or none",
        "whose token fetches from the upstream: `device` (the asker's own, passed on), `builder` (user `builder`, password "
        "`builder-token`, exchanged at the realm that the upstream names), `none`",
        default="device",
    )
    builder_token: str | None = setting(
        values.text,
        "the builder's token (TOKEN_AUTH_BUILDER_TOKEN), which upstream-credentials = builder needs",
        "the password of `builder`; needed with `upstream-credentials = builder`",
        also=("TOKEN_AUTH_BUILDER_TOKEN",),
        secret=True,
    )
    auth: str = setting(
        values.choice("token", "none"),
        "token or none",
        "`token`: every request needs a token of the API; `none`: everybody may pull everything (must be written out)",
        default="token",
    )
    hold: float = setting(
        values.duration, "seconds, such as 45", "seconds that a request waits for its delta before 504", default="45"
    )
    max_builds: int = setting(
        values.count,
        "a whole number from 1 on",
        "builds at once; the rest queue",
        derive=_cores,
        derive_shown="number of cores",
    )
    worth: float = setting(
        values.share,
        "a share from 0 to 10, such as 0.9",
        "a delta of more than this share of the full download is not served",
        default="0.9",
    )
    effort: str = setting(
        values.choice("fast", "balanced", "small"),
        "fast, balanced or small",
        "how hard to look for a smaller delta: `fast`, `balanced`, `small`",
        default="balanced",
    )
    layer_cache: int = setting(
        values.size,
        "bytes, such as 10 GiB",
        "bytes of inflated layers and their indexes that are kept",
        default="10 GiB",
    )
    max_layer: int = setting(
        values.size, "bytes, such as 16 GiB", "bytes that one layer may have when it is inflated", default="16 GiB"
    )
    worker_memory: int = setting(
        values.size, "bytes, such as 1 GiB", "bytes of memory that one build worker may take", default="1 GiB"
    )
    build_timeout: float = setting(
        values.duration, "seconds, such as 1800 or 30 min", "seconds that one build may take", default="1800"
    )
    failure_memory: float = setting(
        values.duration,
        "seconds, such as 600 or 10 min",
        "seconds for which a pair that failed is answered with a full pull",
        default="600",
    )
    log_level: str = setting(
        values.choice("debug", "info", "warn", "error"),
        "debug, info, warn or error",
        "the least important lines that are logged: `debug`, `info`, `warn`, `error`",
        default="info",
    )
    origins: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Where each key's value came from: ``option``, ``environment NAME``, ``file``, ``derived``, ``default``."""
    texts: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """Each key's value as it was written, secrets masked; a key without a value is missing."""

    @property
    def public_host(self) -> str:
        """``host[:port]`` of ``public_url`` for image names; the scheme's own port is left out."""
        return url_host(self.public_url)


def _rows() -> Iterator[Setting]:
    for field in dataclasses.fields(Settings):
        if SECTION in field.metadata:
            yield dataclasses.replace(Setting(*field.metadata[SECTION]), key=field.name.replace("_", "-"))


_TABLE: Final = tuple(_rows())


def table() -> tuple[Setting, ...]:
    """All settings, in the order in which they are documented and derived."""
    return _TABLE


def read(
    options: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Path | None = None,
    *,
    fallbacks: Mapping[str, str] | None = None,
) -> Settings:
    """The effective settings; raises SettingsError, one line, for whatever is unknown, missing or cannot be used.

    ``options`` maps keys (``public-url``) to what the command line gave, None where it gave nothing. ``file`` is an INI file
    with the one section ``[obdelta]``. ``fallbacks`` are the weakest, for commands that can do without a required key.
    """
    from_file = _read_file(file) if file is not None else {}
    for key, value in options.items():
        if key not in _keys():
            raise _unknown(key, value or "", _keys(), "option")
    for name, value in environment.items():
        if name.startswith(PREFIX) and name not in _variables():
            raise _unknown(name, value, _variables(), "environment")
    parsed: dict[str, Any] = {}
    origins: dict[str, str] = {}
    texts: dict[str, str] = {}
    given = Given(environment, parsed)
    for row in _TABLE:
        found, origin = _find(row, options, given, from_file, fallbacks or {})
        origins[row.key] = origin
        if not found:
            if row.required:
                raise SettingsError(row.key, None, f"{row.expected}, as {row.key} in the file or {row.environment[0]}")
            parsed[row.field] = None
            continue
        try:
            parsed[row.field] = row.parse(found)
        except ValueError:
            shown = MASK if row.secret else _clipped(found)
            raise SettingsError(row.key, shown, f"{row.expected} (from {origin})") from None
        texts[row.key] = MASK if row.secret else found
    settings = Settings(**parsed, origins=origins, texts=texts)
    if settings.upstream_credentials == "builder" and settings.builder_token is None:
        raise SettingsError("builder-token", None, next(r.expected for r in _TABLE if r.key == "builder-token"))
    return settings


def _find(
    row: Setting,
    options: Mapping[str, str | None],
    given: Given,
    from_file: Mapping[str, str],
    fallbacks: Mapping[str, str],
) -> tuple[str, str]:
    """The strongest text for a row (``""``: none) and where it came from."""
    if found := (options.get(row.key) or "").strip():
        return found, "option"
    for name in row.environment:
        if found := given.env(name):
            return found, f"environment {name}"
    if found := from_file.get(row.key, "").strip():
        return found, "file"
    if row.derive is not None and (found := row.derive(given) or ""):
        return found, "derived"
    if found := fallbacks.get(row.key, ""):
        return found, "default"
    return row.default or "", "default"


def _read_file(file: Path) -> Mapping[str, str]:
    # No [DEFAULT] magic, no %(interpolation)s, no second delimiter: endpoint strings are full of colons.
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0")
    try:
        parser.read_string(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError("config", str(file), f"a file that can be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingsError("config", str(file), "UTF-8 text") from error
    except configparser.DuplicateOptionError as error:
        raise SettingsError(error.option, "given twice", f"one value (line {error.lineno} of {file})") from error
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or (getattr(error, "errors", None) or [(0,)])[0][0]
        where = f", but line {line} is not" if line else ""
        raise SettingsError("config", str(file), f"key = value lines under [{SECTION}]{where}") from error
    for section in parser.sections():
        if section != SECTION:
            raise SettingsError("config", str(file), f"one section [{SECTION}], found [{section}]")
    if not parser.has_section(SECTION):
        raise SettingsError("config", str(file), f"a section [{SECTION}]")
    found = dict(parser[SECTION])
    for key, value in found.items():
        if key not in _keys():
            raise _unknown(key, value, _keys(), str(file))
    return found


def _keys() -> list[str]:
    return [row.key for row in _TABLE]


def _variables() -> list[str]:
    return [f"{PREFIX}CONFIG", *(name for row in _TABLE for name in row.environment)]


def _unknown(name: str, value: str, known: list[str], where: str) -> SettingsError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return SettingsError(name, MASK if _SECRET_NAME.search(name) else _clipped(value), f"a known key ({where}){hint}")


def _clipped(value: str) -> str:
    return value if len(value) <= 80 else value[:77] + "..."
