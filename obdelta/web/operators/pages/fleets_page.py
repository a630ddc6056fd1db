"""The page of fleets: devices, engine generations, versions that they come from, bytes saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from twisted.web.template import Tag, tags

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.fleet_summaries import FleetSummary
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import Piece, image, moment, name, table

MAX_FLEETS = 200


def content(
    fleets: Sequence[FleetSummary], now: float, names: Mapping[Digest, ImageNames]
) -> list[Tag]:
    """Returns the page below its heading bar. ``names``: what images call themselves."""
    pieces = [
        tags.h1("Fleets"),
        tags.p(
            "Fleets are learned from the updates that devices request. A fleet is named after the"
            " repository that it was updated to last.",
            class_="lead",
        ),
    ]
    if not fleets:
        nothing = tags.p("None yet: no device has requested a delta.", class_="none")
        return [*pieces, tags.section(nothing, id="fleets")]
    pieces.append(
        tags.section(
            table(
                "Fleets, the one with the latest request first",
                ["Fleet", "Updated from", "Devices measured", "Deltas", "Served", "Saved", "Last"],
                [_row(fleet, now, names) for fleet in fleets[:MAX_FLEETS]],
                numeric=(3, 4, 5, 6),
            ),
            id="fleets",
            **{"aria-label": "Fleets"},
        )
    )
    return pieces


def _row(fleet: FleetSummary, now: float, names: Mapping[Digest, ImageNames]) -> list[Piece]:
    called = {repository: names.get(image) for repository, image in fleet.images.items()}
    versions: list[Piece] = [
        tags.div(
            name(str(called.get(repository) or repository)), " ", tags.small(moment(last, now))
        )
        for repository, last in fleet.versions
    ]
    if fleet.more_versions:
        versions.append(tags.small(f"and {number_format.number(fleet.more_versions)} more"))
    devices = [
        f"{number_format.number(count)} with {engine}" for engine, count in fleet.devices.items()
    ]
    address = f"/deltas?{urlencode({'fleet': fleet.repository})}"
    return [
        tags.a(image(fleet.repository, called.get(fleet.repository)), href=address),
        tags.span(*versions, class_="reason"),
        ", ".join(devices) or "none yet",
        number_format.number(fleet.deltas),
        f"{number_format.number(fleet.served)}×",
        number_format.size(fleet.saved),
        moment(fleet.last, now),
    ]
