"""The target's ``Config`` as ``docker inspect`` prints it: the start of a v2 stream.

Devices make the new image from it. Source: the fields of ``container.Config`` in Docker 20.10's
API, and Go's rules to decode and encode them: names match in any case, unknown ones are dropped,
missing ones get their type's zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from obdelta.errors import ManifestInvalid
from obdelta.oci import ImageConfig

Read = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("a whole number")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError("a list")
    return ["" if one is None else _text(one) for one in value]


def _command(value: Any) -> list[str]:
    """Returns a command, which may also be one text."""
    return [value] if isinstance(value, str) else _texts(value)


def _labels(value: Any) -> dict[str, str]:
    return {key: "" if one is None else _text(one) for key, one in _object(value).items()}


def _names(value: Any) -> dict[str, dict[str, Any]]:
    """Returns an object with its keys only; values have no meaning."""
    return {key: {} for key, one in _object(value).items() if one is None or _object(one) is one}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object")
    return value


_HEALTHCHECK: Mapping[str, tuple[Read, Any]] = {
    "Test": (_texts, None),
    "Interval": (_whole, 0),
    "Timeout": (_whole, 0),
    "StartPeriod": (_whole, 0),
    "Retries": (_whole, 0),
}


def _healthcheck(value: Any) -> dict[str, Any]:
    found = _fields(_object(value), _HEALTHCHECK)
    return {key: one for key, one in found.items() if one}


_FIELDS: Mapping[str, tuple[Read, Any]] = {
    "Hostname": (_text, ""),
    "Domainname": (_text, ""),
    "User": (_text, ""),
    "AttachStdin": (_flag, False),
    "AttachStdout": (_flag, False),
    "AttachStderr": (_flag, False),
    "ExposedPorts": (_names, None),
    "Tty": (_flag, False),
    "OpenStdin": (_flag, False),
    "StdinOnce": (_flag, False),
    "Env": (_texts, None),
    "Cmd": (_command, None),
    "Healthcheck": (_healthcheck, None),
    "ArgsEscaped": (_flag, False),
    "Image": (_text, ""),
    "Volumes": (_names, None),
    "WorkingDir": (_text, ""),
    "Entrypoint": (_command, None),
    "NetworkDisabled": (_flag, False),
    "MacAddress": (_text, ""),
    "OnBuild": (_texts, None),
    "Labels": (_labels, None),
    "StopSignal": (_text, ""),
    "StopTimeout": (_whole, None),
    "Shell": (_command, None),
}
_OMITTED_IF_EMPTY = (
    "ExposedPorts",
    "ArgsEscaped",
    "NetworkDisabled",
    "MacAddress",
    "StopSignal",
    "Shell",
)
_OMITTED_IF_NULL = ("Healthcheck", "StopTimeout")


def docker_config(image: ImageConfig) -> dict[str, Any] | None:
    """Returns the object, or None for an image without a config. Raises ManifestInvalid if an
    engine would not load it.
    """
    value = image.value.get("config")
    if value is None:
        return None
    try:
        found = _fields(_object(value), _FIELDS)
    except TypeError as error:
        raise ManifestInvalid(
            "image config", f"in its config, {error} is expected where something else is"
        ) from error
    for key in _OMITTED_IF_EMPTY:
        if not found[key]:
            del found[key]
    for key in _OMITTED_IF_NULL:
        if found[key] is None:
            del found[key]
    return found


def _fields(value: dict[str, Any], fields: Mapping[str, tuple[Read, Any]]) -> dict[str, Any]:
    found = {key: zero for key, (_, zero) in fields.items()}
    spelled = {key.lower(): key for key in fields}
    for given, one in value.items():
        key = spelled.get(given.lower())
        if key is not None:
            read, zero = fields[key]
            if one is not None:
                found[key] = read(one)
            elif zero is None:
                found[key] = None
    return found
