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
class Given:
    """Input of a derived default: the environment, and the settings above it in the table."""

    environment: Mapping[str, str]
    values: Mapping[str, Any]

    def env(self, name: str) -> str:
        """Returns the variable's value without surrounding blanks, ``""`` where it is not set."""
        return self.environment.get(name, "").strip()


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. ``parse`` raises ValueError, whose error text then contains
    ``expected``.
    """

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
        """Returns the attribute of :class:`Settings`."""
        return self.key.replace("-", "_")

    @property
    def help(self) -> str:
        """Returns the meaning without Markdown, for help texts."""
        return _LINK.sub("", self.meaning).replace("`", "")

    @property
    def environment(self) -> tuple[str, ...]:
        """Returns the environment variables of the setting, the strongest first."""
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
    """Returns a field of :class:`Settings`. Its key is the field's name with hyphens.

    ``also`` names further variables that hold the value itself. ``derive`` computes a default from
    other settings. ``derive_shown`` and ``default_shown`` describe it in the documentation. Without
    any value a field is None, or, when ``required``, the start stops.
    """
    shown = (
        default_shown
        if default_shown is not None
        else (f"`{default}`" if default is not None else "none")
    )
    row = (
        "",
        parse,
        expected,
        meaning,
        default,
        shown,
        derive,
        derive_shown,
        also,
        required,
        secret,
    )
    return dataclasses.field(repr=not secret, metadata={ROW: row})
