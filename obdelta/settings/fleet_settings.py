"""Settings of the fleet: openBalena's API, and what is prepared for its new releases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from obdelta.settings import address_parsers, parsers
from obdelta.settings.setting import DefaultContext, setting

QUOTA_SHARE = 4
"""Unless a setting says otherwise, the deltas of one release may take the quota divided by this
number.
"""


def _bytes_of_quota(context: DefaultContext) -> str:
    return str(context.values["store_quota"] // QUOTA_SHARE)


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """openBalena's API, which knows releases and devices."""

    api_url: str | None = setting(
        address_parsers.url,
        "the URL of openBalena's API, without a path (https://api.example.com)",
        "URL of openBalena's API; without this setting, the server does not look for new releases",
    )
    api_token: Path | str | None = setting(
        parsers.path_or_word,
        "the absolute path of a file with a token of the API, or the token",
        "API key or token with which this server reads the API, or the absolute path of a file that"
        " contains it; a changed file is read again; `api-url` needs this setting",
        secret=True,
    )
    api_poll: float = setting(
        parsers.period,
        "seconds from 1 to 86400, such as 60",
        "seconds between two requests for new releases",
        default="60",
    )
    prepare_devices: int = setting(
        parsers.count,
        "a whole number from 1 on",
        "a release is a base for a new release's deltas if at least this number of devices runs it",
        default="1",
    )
    prepare_rollback: int = setting(
        parsers.limit,
        "a whole number, 0 for none",
        "number of base releases for which the delta in the opposite direction is built, too; the"
        " server chooses the releases with the most devices",
        default="0",
    )
    prepare_seconds: float = setting(
        parsers.duration,
        "seconds, such as 1 h",
        "most seconds of building for one new release; the server builds the other deltas when a"
        " device asks for them",
        default="1 h",
    )
    prepare_bytes: int = setting(
        parsers.size,
        "bytes, such as 5 GiB",
        "most bytes of deltas that are built in advance for one new release",
        derive=_bytes_of_quota,
        derived_help="a quarter of `store-quota`",
    )
