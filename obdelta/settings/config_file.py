"""The settings file: where it is found, and its keys with their line numbers."""

from __future__ import annotations

import configparser
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from obdelta.errors import SettingsError, joined
from obdelta.settings.schema import old_keys, table

SECTION: Final = "obdelta"
VARIABLE: Final = "OBDELTA_CONFIG"
HERE: Final = Path("tap.conf")
SYSTEM: Final = Path("/etc/obdelta/tap.conf")


def find_file(given: str | None, environment: Mapping[str, str]) -> Path | None:
    """Returns the settings file: the given one, that of ``OBDELTA_CONFIG``, ``tap.conf`` here, or
    ``/etc/obdelta/tap.conf``. None if there is none.

    Raises SettingsError for a ``tap.conf`` in this directory that another user owns: anyone who
    can write there could choose where this program connects.
    """
    if named := given or environment.get(VARIABLE, "").strip():
        return Path(named)
    if HERE.is_file():
        if HERE.stat().st_uid not in (0, os.geteuid()):
            raise SettingsError(
                "config",
                str(HERE.absolute()),
                f"a file of yours: another user owns it: name it (-c {HERE}) to use it",
            )
        return HERE
    return SYSTEM if SYSTEM.is_file() else None


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file as read: its keys, their lines, and what is wrong with it."""

    path: Path | None = None
    values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    lines: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    errors: tuple[SettingsError, ...] = ()

    def place(self, key: str) -> str:
        """Returns where a key is, for error texts: ``tap.conf:12``."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


class _Parser(configparser.RawConfigParser):
    """Records the line of each key, and keys that are given twice."""

    def __init__(self) -> None:
        # No [DEFAULT] section, no second delimiter: endpoint strings are full of colons.
        super().__init__(delimiters=("=",), default_section="\0", strict=False)
        self.lines: dict[str, int] = {}
        self.repeated: list[tuple[str, int]] = []
        self._line: int | None = None

    def read_text(self, text: str) -> None:
        """Parses a file's content. Raises configparser.Error; keys that were read are kept."""
        try:
            self.read_file(self._counted(text))
        finally:
            self._line = None

    def _counted(self, text: str) -> Iterator[str]:
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            self._line = number
            yield line

    def optionxform(self, optionstr: str) -> str:
        """Returns the key in lower case. The parser calls this for each line with a key."""
        key = super().optionxform(optionstr)
        if self._line is not None:
            if key in self.lines:
                self.repeated.append((key, self._line))
            self.lines.setdefault(key, self._line)
        return key


def read_file(path: Path) -> ConfigFile:
    """Returns the file's content, and all errors of its form. Raises SettingsError if nothing of
    it can be read.
    """
    parser = _Parser()
    errors: list[SettingsError] = []
    form = f"key = value lines under [{SECTION}]"
    try:
        parser.read_text(path.read_text("utf-8-sig"))
    except OSError as error:
        raise SettingsError(
            "config", str(path), f"a file that can be read ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError("config", str(path), "UTF-8 text") from error
    except configparser.MissingSectionHeaderError as error:
        raise SettingsError(
            "config",
            str(path),
            f"{form}: write [{SECTION}] in a line of its own before line {error.lineno}",
        ) from error
    except configparser.ParsingError as error:
        errors += [
            SettingsError(
                "config", str(path), f"{form}, but line {line} is not: it needs a key and a ="
            )
            for line, _ in error.errors
        ]
    errors += [
        SettingsError(key, "given twice", f"one value ({path}:{parser.lines[key]} and line {line})")
        for key, line in parser.repeated
    ]
    errors += [
        SettingsError(
            "config",
            str(path),
            f"one section [{SECTION}], found [{section}]: rename or remove that line",
        )
        for section in parser.sections()
        if section != SECTION
    ]
    if not parser.has_section(SECTION):
        if not parser.sections():
            errors.append(SettingsError("config", str(path), f"a section [{SECTION}]"))
        raise joined(errors)
    values = dict(parser[SECTION])
    for key, value in values.items():
        values[key], found = _without_indented_key(value)
        if found is not None:
            expected = (
                f"a line that begins with it: it is indented, so it continues the value of {key}"
                f" ({path}:{parser.lines[key]})"
            )
            errors.append(SettingsError(found, None, expected))
    return ConfigFile(path, values, parser.lines, tuple(errors))


def _without_indented_key(value: str) -> tuple[str, str | None]:
    """Returns a value up to an indented line with another setting, and that setting's key; None if
    there is none. The rest is not displayed as part of this value: it may be a secret.
    """
    known = {*(row.key for row in table()), *old_keys()}
    lines = value.splitlines()
    for number, line in enumerate(lines[1:], 1):
        # An area and its level (``builds=debug``) have no spaces.
        name, equals, _ = line.partition(" = ")
        if equals and name.strip().lower() in known:
            return "\n".join(lines[:number]).strip(), name.strip().lower()
    return value, None
