"""Records that were written as JSON, read back: by a server of another version, or from one that
lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known_fields(cls: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """What ``value`` has of a dataclass's fields, text and numbers checked; what else there is in
    it is passed over. KeyError, TypeError: it is none.
    """
    found = {field.name: value[field.name] for field in fields(cls)}
    for field in fields(cls):
        one = found[field.name]
        if field.type == "str" and not isinstance(one, str):
            raise TypeError(f"{field.name} is no text")
        if field.type == "int" and not (isinstance(one, int) and 0 <= one < 1 << 63):
            raise TypeError(f"{field.name} is no number of bytes or things")
    return found
