"""Parser for ``WWW-Authenticate`` challenges from untrusted servers.

Source: RFC 9110, 11.2 to 11.6.1 (several challenges in one header, quoted strings, token68). The
contents of a Bearer challenge follow distribution's token authentication specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_WORD})(?:[ \t]+|(?=,)|$)", re.ASCII)
_PARAMETER = re.compile(
    rf'({_WORD})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))', re.ASCII | re.DOTALL
)
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))", re.ASCII)
_BETWEEN = re.compile(r"[ \t]*(?:,[ \t,]*|$)")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_MAX_HEADER = 16 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; scheme and parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[bytes]) -> list[Challenge]:
    """Returns the challenges of all ``WWW-Authenticate`` headers, in order. Parsing of a header
    stops where it is malformed.
    """
    return [challenge for header in headers for challenge in _parse(header.decode("latin-1"))]


def _parse(header: str) -> list[Challenge]:
    found: list[tuple[str, dict[str, str]]] = []
    end = len(header)
    if end > _MAX_HEADER:
        return []
    at = len(header) - len(header.lstrip(" \t,"))
    while at < end:
        parameter = _PARAMETER.match(header, at)
        if parameter is not None and found:
            name, quoted, bare = parameter.groups()
            value = bare if quoted is None else _ESCAPED.sub(r"\1", quoted)
            # The first of two parameters with one name counts, as in Go's and Docker's clients.
            found[-1][1].setdefault(name.lower(), value)
            at = parameter.end()
        elif (scheme := _SCHEME.match(header, at)) is not None:
            found.append((scheme[1].lower(), {}))
            at = scheme.end()
            if _PARAMETER.match(header, at) is not None:
                continue
            if (opaque := _TOKEN68.match(header, at)) is not None:
                at = opaque.end()
        else:
            break
        between = _BETWEEN.match(header, at)
        if between is None:
            break
        at = between.end()
    return [Challenge(scheme, parameters) for scheme, parameters in found]
