"""How one setting is described, and the row that it is in the table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

PREFIX: Final = "OBDELTA_"
ROW: Final = "setting"
"""The key under which a field of Settings carries its row."""


_LINK: Final = re.compile(r" ?\(\[[^]]*\]\([^)]*\)\)")
"""A link to the documentation, in brackets."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a derived default may look at: the environment, and the settings that stand above it in
    the table.
    """

    environment: Mapping[str, str]
    values: Mapping[str, Any]

    def env(self, name: str) -> str:
        """The variable's value without blanks around it, ``""`` where it is not set."""
        return self.environment.get(name, "").strip()


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. ``parse`` raises ValueError; ``expected`` is what an error then says
    was expected.
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
        """The attribute of :class:`Settings`."""
        return self.key.replace("-", "_")

    @property
    def help(self) -> str:
        """The meaning without Markdown, for help texts."""
        return _LINK.sub("", self.meaning).replace("`", "")

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

    ``also`` names further variables that hold the value itself. ``derive`` makes a default of what
    else is known; ``derive_shown`` and ``default_shown`` are how the documentation tells it.
    Without any value a field is None, or, when ``required``, the start stops.
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
