"""The description of one setting: key, parser, default, help text and environment variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

PREFIX: Final = "OBDELTA_"
ROW: Final = "setting"
"""The key of a Settings field's metadata that holds its description."""
_LINK: Final = re.compile(r" ?\(\[[^]]*\]\([^)]*\)\)")
"""A link to the documentation, in brackets."""


@dataclass(frozen=True, slots=True)
class DefaultContext:
    """Input of a derived default: the environment, and the settings above it in the table."""

    environment: Mapping[str, str]
    values: Mapping[str, Any]

    def env(self, name: str) -> str:
        """Returns the variable's value without surrounding blanks, ``""`` if it is not set."""
        return self.environment.get(name, "").strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. ``parse`` raises ValueError, whose error text then contains ``expected``."""

    key: str = ""
    parse: Callable[[str], Any]
    expected: str
    help_text: str
    default: str | None
    default_help: str
    derive: Callable[[DefaultContext], str | None] | None
    derived_help: str
    variables: tuple[str, ...]
    old_key: str
    superseded: str
    required: bool
    secret: bool

    @property
    def field(self) -> str:
        """Returns the attribute of :class:`Settings`."""
        return self.key.replace("-", "_")

    @property
    def help(self) -> str:
        """Returns the meaning without Markdown, for help texts."""
        return _LINK.sub("", self.help_text).replace("`", "")

    @property
    def environment(self) -> tuple[str, ...]:
        """Returns the environment variables of the setting, the strongest first."""
        return (variable(self.key), *self.variables)


def variable(key: str) -> str:
    """Returns the environment variable of a key: ``OBDELTA_PUBLIC_URL`` for ``public-url``."""
    return PREFIX + key.replace("-", "_").upper()


def setting(
    parse: Callable[[str], Any],
    expected: str,
    help_text: str = "",
    *,
    default: str | None = None,
    default_help: str | None = None,
    derive: Callable[[DefaultContext], str | None] | None = None,
    derived_help: str = "",
    variables: tuple[str, ...] = (),
    old_key: str = "",
    superseded: str = "",
    required: bool = False,
    secret: bool = False,
) -> Any:
    """Returns a field of :class:`Settings`. Its key is the field's name with hyphens.

    ``variables`` names further variables that hold the value itself. ``derive`` computes a default
    from other settings. ``derived_help`` and ``default_help`` describe it in the documentation.
    Without any value a field is None, or, when ``required``, the start stops.

    ``old_key`` is an older key that still works. ``superseded`` says what took the setting's place:
    such a setting is no longer documented, but a value that an installation has is still used.
    """
    if default_help is None:
        default_help = "none" if default is None else f"`{default}`"
    row = Setting(
        parse=parse,
        expected=expected,
        help_text=help_text,
        default=default,
        default_help=default_help,
        derive=derive,
        derived_help=derived_help,
        variables=variables,
        old_key=old_key,
        superseded=superseded,
        required=required,
        secret=secret,
    )
    return dataclasses.field(repr=not secret, metadata={ROW: row})
