"""``obdelta token inspect``: what a device's token says, and which of its claims is refused."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from obdelta.cli.options import (
    OK,
    UNSATISFIED,
    Commands,
    WrongUsage,
    add_json,
    add_setting_options,
    read_secret,
    read_settings,
)
from obdelta.cli.tables import ago, table
from obdelta.oci import Reference

_CLAIMS: Final = ("sub", "iss", "aud", "nbf", "exp", "access")
_MAX_SHOWN: Final = 8


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "token",
        run,
        "show what a token says, and which claim is refused",
        "Checks a device's token as the server with these settings does.\nExits with 3 if it is"
        " refused, or does not allow to pull one of the images.",
        ["obdelta token inspect @token -c tap.conf", "obdelta token inspect - v2/0123… v2/4567…"],
    )
    parser.add_argument("action", metavar="inspect", choices=("inspect",), help="the action")
    parser.add_argument("token", metavar="@FILE", help="a file with the token; - is stdin")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="images to pull with it")
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Examines the token and prints what it found."""
    from obdelta.app.access import make_access
    from obdelta.web.devices.access.admission import TokenAccess

    token = read_secret(parsed.token, "token").encode("ascii")
    access = make_access(read_settings(parsed, {"upstream": "http://localhost"}))
    if not isinstance(access, TokenAccess):
        raise WrongUsage("the settings have auth = none: a server with them reads no tokens")
    examined = access.examine(token)
    problems = dict(examined.problems)
    pulls = [] if "access" in problems else granted(examined.claims)
    missing = [
        name for image in parsed.images if (name := Reference.parse(image).repository) not in pulls
    ]
    if missing and "access" not in problems:
        problems["access"] = f"the token does not allow pull on {', '.join(missing)}"
    if parsed.json:
        claims = {name: examined.claims.get(name) for name in _CLAIMS}
        print(json.dumps({"claims": claims, "problems": problems, "pulls": pulls}))
    else:
        print(as_text(examined.claims, problems, pulls, time.time()))
    return UNSATISFIED if problems else OK


def granted(claims: Mapping[str, Any]) -> list[str]:
    """Returns the repositories that claims allow to pull; none if they cannot be read."""
    from obdelta.web.devices.access.token_verifier import TokenInvalid, repositories

    try:
        return repositories(claims)
    except TokenInvalid:
        return []


def as_text(
    claims: Mapping[str, Any], problems: Mapping[str, str], pulls: Sequence[str], now: float
) -> str:
    """Returns the claims as text, each with its verdict."""
    rows = [["signature", "", problems.get("signature", "ok")]]
    for name in _CLAIMS:
        value = claims.get(name)
        if name == "access":
            shown = ", ".join(pulls[:_MAX_SHOWN]) + (" …" if len(pulls) > _MAX_SHOWN else "")
            shown = f"pull on {shown}" if pulls else "nothing"
        elif name in ("nbf", "exp"):
            shown = moment(value, now)
        else:
            shown = "-" if value is None else str(value)
        rows.append([name, shown, problems.get(name, "ok")])
    return table(["claim", "value", "verdict"], rows)


def moment(value: object, now: float) -> str:
    """Returns a claim's time in UTC, and how far it is from now."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else str(value)
    try:
        shown = datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return str(value)
    return (
        f"{shown} ({ago(now - value)} ago)" if value <= now else f"{shown} (in {ago(value - now)})"
    )


def described(token: str, now: float) -> str:
    """Returns what a refused token states, as one line. Its signature is not checked."""
    from obdelta.web.devices.access.token_verifier import unverified_claims

    claims = unverified_claims(token.encode("ascii", "replace"))
    if not claims:
        return "the token cannot be read"
    pulls = granted(claims)
    shown = ", ".join(pulls[:_MAX_SHOWN]) or "nothing"
    parts = [f"{name} {claims[name]}" for name in ("sub", "iss", "aud") if name in claims]
    expires = claims.get("exp")
    if isinstance(expires, int | float) and not isinstance(expires, bool):
        parts.append(
            f"expired {ago(now - expires)} ago"
            if expires <= now
            else f"valid for {ago(expires - now)}"
        )
    return f"the token states {', '.join([*parts, f'pull on {shown}'])}"
