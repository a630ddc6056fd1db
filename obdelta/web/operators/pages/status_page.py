"""The sections of the first page. Each is rendered from values, and can be sent again alone when
they change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from twisted.web.template import Tag, tags

from obdelta.builds.device_estimates import MIN_DEVICES, FleetEstimate
from obdelta.builds.running_build import RunningBuild
from obdelta.oci import Digest, Form, ImageNames
from obdelta.store.catalogue.records import DeltaKey, DeltaRow
from obdelta.web.operators.deltas_api import NO_NAMES
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import (
    Piece,
    cards,
    empty,
    kind_of,
    moment,
    name,
    pair,
    section,
    table,
)
from obdelta.web.operators.pages.plot import saved_over_time, share_bar, use_of_store
from obdelta.web.operators.pages.sections.action_forms import NO_FORMS, ActionForms
from obdelta.web.operators.pages.sections.attention import attention, is_failed
from obdelta.web.operators.pages.sections.pairs_without_delta import failures, refused, skipped
from obdelta.web.operators.pages.sections.status_data import StatusData

MAX_BUILDS = 50
"""Maximum number of builds displayed: a long queue must not be rendered four times a second."""

MAX_FLEETS = 20
"""Maximum number of fleets displayed."""


def sections(
    data: StatusData,
    running: Sequence[RunningBuild],
    forms: ActionForms = NO_FORMS,
    unit: str = "",
    names: Mapping[Digest, ImageNames] = NO_NAMES,
) -> dict[str, Tag]:
    """Returns all sections by name, in the page's order. ``forms`` makes the buttons, ``unit`` is
    the plot's step, and ``names`` are those of images that are being built.
    """
    return {
        "state": state(data.problems, data.notes),
        "attention": attention(data),
        "builds": builds(running, data.clock, names),
        "summary": summary(data, running),
        "saved": saved(data, unit),
        "deltas": recent(data.recent, data.now, data.names),
        "failures": failures(
            [row for row in data.failures if is_failed(row)], data.now, forms, data.names
        ),
        "skipped": skipped(
            [row for row in data.failures if not is_failed(row)], data.now, data.names
        ),
        "refused": refused(data.refused, data.now),
        "devices": devices(data.fleets),
        "store": store(data),
    }


def state(problems: Mapping[str, str | None], notes: Sequence[str] = ()) -> Tag:
    """Returns one line: whether the server can do its work, and notes for operators."""
    wrong = [f"{part}: {why}" for part, why in problems.items() if why is not None]
    words = "Not ready. " + " · ".join(map(number_format.visible, wrong)) if wrong else "Ready"
    words = " · ".join([words, *map(number_format.visible, notes)])
    return tags.p(
        tags.span(class_="dot"), words, id="state", class_="bad" if wrong else "good", role="status"
    )


def summary(data: StatusData, running: Sequence[RunningBuild]) -> Tag:
    """Returns the section of the main figures."""
    full, delta, count = (
        sum(data.counters.get(f"served.{kind}.{what}", 0) for kind in ("v2", "v3"))
        for what in ("full_bytes", "delta_bytes", "deltas")
    )
    waiting = sum(build.started is None for build in running)
    return section(
        "summary",
        "Since installation",
        cards(
            (
                "Saved",
                number_format.size(full - delta),
                (
                    f"{number_format.share(full - delta, full)} of {number_format.size(full)}"
                    if full
                    else "no delta served yet"
                ),
            ),
            ("Deltas served", number_format.number(count), f"{number_format.size(delta)} sent"),
            (
                "Deltas kept",
                number_format.number(data.totals.deltas),
                number_format.size(data.totals.blob_bytes),
            ),
            (
                "Builds now",
                number_format.number(len(running) - waiting),
                f"{number_format.number(waiting)} queued",
            ),
            ("Devices now", number_format.number(data.devices), "with a request in progress"),
        ),
    )


def saved(data: StatusData, unit: str) -> Tag:
    """Returns the section of the plot, in steps of ``unit``."""
    if not data.served_daily:
        return empty("saved", "Bytes saved", "Nothing yet.")
    drawn = saved_over_time(data.served, data.served_daily, data.now, unit)
    return section("saved", "Bytes saved", drawn)


def shown_builds(running: Sequence[RunningBuild]) -> Sequence[RunningBuild]:
    """Returns the builds that are displayed: running ones, then the queue."""
    return sorted(running, key=lambda build: build.started is None)[:MAX_BUILDS]


def builds(
    running: Sequence[RunningBuild], now: float, names: Mapping[Digest, ImageNames] = NO_NAMES
) -> Tag:
    """Returns the section of queued and running builds. ``names``: what images call themselves."""
    if not running:
        return empty(
            "builds", "Running builds", "None. A build starts when a device requests a delta."
        )
    rows: list[list[Piece]] = [
        [
            pair(
                build.pair.base.repository,
                build.pair.target.repository,
                names,
                of=(build.pair.base.manifest.digest, build.pair.target.manifest.digest),
            ),
            build.pair.kind,
            _progress(build),
            number_format.duration(now - (build.since if build.started is None else build.started)),
            number_format.number(build.waiting),
        ]
        for build in shown_builds(running)
    ]
    more = len(running) - len(rows)
    return section(
        "builds",
        "Running builds",
        table(
            "Running builds, then the queue, oldest first",
            ["Target", "Kind", "Progress", "Time", "Waiting"],
            rows,
            numeric=(3, 4),
        ),
        tags.p(f"And {number_format.number(more)} more queued builds.") if more else "",
    )


def progress_of(build: RunningBuild) -> tuple[str, float | None]:
    """Returns a build's progress in words, and as a fraction from 0 to 1 if it is known."""
    if build.started is None:
        return "queued", None
    progress: Mapping[str, Any] = build.progress
    stage = str(progress.get("stage", "starting"))
    layers, done, total = (
        int(progress.get("layers") or 0),
        int(progress.get("done") or 0),
        int(progress.get("of") or 0),
    )
    if not layers or "layer" not in progress:
        return stage, None
    part = min(1.0, done / total) if total else 0.0
    return f"layer {int(progress['layer']) + 1} of {layers}: {stage} {100 * part:.0f} %", (
        int(progress["layer"]) + part
    ) / layers


def _progress(build: RunningBuild) -> Tag:
    words, part = progress_of(build)
    bar = Tag("progress", {"max": "1", "aria-label": "Progress"})
    if part is not None:
        bar(value=f"{part:.3f}")
    return tags.div(bar if build.started is not None else "", tags.span(words), class_="progress")


def recent(
    rows: Sequence[DeltaRow], now: float, names: Mapping[Digest, ImageNames] = NO_NAMES
) -> Tag:
    """Returns the section of the newest deltas. ``names``: what images call themselves."""
    if not rows:
        return empty("deltas", "Recent deltas", "None yet.")
    return section(
        "deltas",
        "Recent deltas",
        table(
            "The newest finished deltas; each links to its details",
            ["Target", "Kind", "In full", "Delta", "Saving", "Built in", "Served", "Made"],
            [
                [
                    tags.a(
                        pair(
                            row.base_repository,
                            row.target_repository,
                            names,
                            of=(row.key.base, row.key.target),
                        ),
                        href=path_of(row.key),
                    ),
                    kind_of(row.key),
                    number_format.size(row.full_bytes),
                    tags.span(
                        number_format.size(row.delta_bytes),
                        share_bar(row.delta_bytes, row.full_bytes),
                    ),
                    number_format.share(row.full_bytes - row.delta_bytes, row.full_bytes),
                    number_format.duration(row.seconds),
                    f"{number_format.number(row.served)}×",
                    moment(row.created, now),
                ]
                for row in rows
            ],
            numeric=(2, 3, 4, 5, 6, 7),
        ),
        tags.p(tags.a("All deltas: search, sort and filter", href="/deltas"), class_="more"),
    )


def devices(fleets: Sequence[FleetEstimate]) -> Tag:
    """Returns the section about the speed of fleets' devices."""
    if not fleets:
        return empty(
            "devices",
            "Devices",
            f"Not known yet: that takes {MIN_DEVICES} devices of a fleet that downloaded two"
            " large layers each.",
        )
    return section(
        "devices",
        "Devices",
        table(
            "What devices of a fleet are like, as their downloads show",
            ["Fleet", "Engines read", "Link", "A command", "Devices"],
            [
                [
                    tags.span(name(fleet.repository), class_="pair"),
                    fleet.engine.value,
                    number_format.bit_rate(fleet.estimate.link),
                    f"{fleet.estimate.command:.0f} µs",
                    number_format.number(fleet.estimate.devices),
                ]
                for fleet in fleets[:MAX_FLEETS]
            ],
            numeric=(2, 3, 4),
        ),
        tags.p(tags.a("All fleets", href="/fleets"), class_="more"),
    )


def store(data: StatusData) -> Tag:
    """Returns the section of the store's quota."""
    return section("store", "Store", use_of_store(data.store, data.quota))


def path_of(key: DeltaKey) -> str:
    """Returns the path of a delta's page."""
    path = quote(f"/pairs/{key.kind}/{key.recipe}/{key.base.hex}/{key.target.hex}")
    return path if key.form is Form.UNIVERSAL else f"{path}?form={key.form.value}"
