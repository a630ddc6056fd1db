"""Reads dataclass fields from JSON that another version, or an untrusted server, has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known_fields(cls: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of dataclass ``cls`` in ``value``; others are ignored. Texts and numbers
    are checked.

    Raises KeyError or TypeError if ``value`` is no such record.
    """
    found = {field.name: value[field.name] for field in fields(cls)}
    for field in fields(cls):
        one = found[field.name]
        if field.type == "str" and not isinstance(one, str):
            raise TypeError(f"{field.name} is no text")
        if field.type == "int" and not (isinstance(one, int) and 0 <= one < 1 << 63):
            raise TypeError(f"{field.name} is no number of bytes or things")
    return found
