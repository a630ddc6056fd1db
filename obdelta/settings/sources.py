"""Reads the settings: option, then environment, then file, then derived, then default."""

from __future__ import annotations

import configparser
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from obdelta.errors import SettingsError
from obdelta.settings.schema import Settings, table
from obdelta.settings.setting import PREFIX, Given, Setting

SECTION: Final = "obdelta"
MASK: Final = "***"
_SERVICE_LINKS: Final = (
    (re.compile(r"_SERVICE_HOST"), re.compile(r"[0-9a-fA-F.:]+")),
    (re.compile(r"_SERVICE_PORT(_[A-Z0-9_]+)?"), re.compile(r"[0-9]{1,5}")),
    (
        re.compile(r"_PORT(_[0-9]{1,5}_(TCP|UDP|SCTP))?"),
        re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+"),
    ),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PROTO"), re.compile(r"tcp|udp|sctp")),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PORT"), re.compile(r"[0-9]{1,5}")),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_ADDR"), re.compile(r"[0-9a-fA-F.:]+")),
)
"""Endings of service links' names, and the form of their values."""
_SECRET_NAME = re.compile(r"token|secret|password|key|credential", re.IGNORECASE)


def read(
    options: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Path | None = None,
    *,
    fallbacks: Mapping[str, str] | None = None,
) -> Settings:
    """Returns the effective settings. Raises SettingsError, one line, for any unknown, missing or
    unusable setting.

    ``options`` maps keys (``public-url``) to values of the command line, None where it gave none.
    ``file`` is an INI file with the one section ``[obdelta]``. ``fallbacks`` are the weakest, for
    commands that can do without a required key.
    """
    from_file = _read_file(file) if file is not None else {}
    for key, value in options.items():
        if key not in _keys():
            raise _unknown(key, value or "", _keys(), "option")
    for name, value in environment.items():
        if (
            name.startswith(PREFIX)
            and name not in _variables()
            and not is_service_link(name, value)
        ):
            raise _unknown(name, value, _variables(), "environment")
    parsed: dict[str, Any] = {}
    origins: dict[str, str] = {}
    texts: dict[str, str] = {}
    given = Given(environment, parsed)
    for row in table():
        found, origin = _find(row, options, given, from_file, fallbacks or {})
        origins[row.key] = origin
        if not found:
            if row.required:
                raise SettingsError(
                    row.key,
                    None,
                    f"{row.expected}, as {row.key} in the file or {row.environment[0]}",
                )
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
        raise SettingsError(
            "builder-token", None, next(r.expected for r in table() if r.key == "builder-token")
        )
    return settings


def is_service_link(name: str, value: str) -> bool:
    """Returns whether Kubernetes (or Docker's old links) made the variable for a service named
    "obdelta…".

    Every pod gets such variables, unless ``enableServiceLinks: false`` is set. Name and value must
    both have the shape. Source: Kubernetes, "Accessing Services", environment variables.
    """
    return any(
        shape.fullmatch(value.strip())
        and (end := re.search(f"(?:{ending.pattern})$", name))
        and end.start() > 0
        for ending, shape in _SERVICE_LINKS
    )


def _find(
    row: Setting,
    options: Mapping[str, str | None],
    given: Given,
    from_file: Mapping[str, str],
    fallbacks: Mapping[str, str],
) -> tuple[str, str]:
    """Returns the strongest text for a row (``""``: none) and its source."""
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
    # No [DEFAULT] section, no %(interpolation)s, no second delimiter: endpoint strings are full of
    # colons.
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="\0")
    try:
        parser.read_string(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(
            "config", str(file), f"a file that can be read ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError("config", str(file), "UTF-8 text") from error
    except configparser.DuplicateOptionError as error:
        raise SettingsError(
            error.option, "given twice", f"one value (line {error.lineno} of {file})"
        ) from error
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or (getattr(error, "errors", None) or [(0,)])[0][0]
        where = f", but line {line} is not" if line else ""
        raise SettingsError(
            "config", str(file), f"key = value lines under [{SECTION}]{where}"
        ) from error
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
    return [row.key for row in table()]


def _variables() -> list[str]:
    return [f"{PREFIX}CONFIG", *(name for row in table() for name in row.environment)]


def _unknown(name: str, value: str, known: list[str], where: str) -> SettingsError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    # A typo in a secret's name must not reveal the secret.
    secret = any(_SECRET_NAME.search(each) for each in (name, *near))
    return SettingsError(name, MASK if secret else _clipped(value), f"a known key ({where}){hint}")


def _clipped(value: str) -> str:
    return value if len(value) <= 80 else value[:77] + "..."
