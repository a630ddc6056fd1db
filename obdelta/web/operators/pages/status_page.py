"""The sections of the first page. Each is rendered from values, and can be sent again alone when
they change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from twisted.web.template import Tag, tags

from obdelta.builds.service import RunningBuild
from obdelta.store.catalogue.history import Served
from obdelta.store.catalogue.records import DeltaKey, DeltaRow, FailureRow, Totals
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.markup import Piece, cards, moment, name, section, short, table
from obdelta.web.operators.pages.plot import saved_over_time, share_bar, use_of_store

MOST_BUILDS = 50
"""Maximum number of builds displayed: a long queue must not be rendered four times a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The data of the first page at ``now`` (seconds UTC). ``clock`` is the same moment by the
    clock that times builds.

    ``store`` maps kinds to bytes. ``problems`` maps parts to the reason why they are not ready.
    ``notes`` are further lines for operators.
    """

    now: float
    clock: float
    devices: int
    totals: Totals
    counters: Mapping[str, int]
    served: Sequence[Served]
    recent: Sequence[DeltaRow]
    failures: Sequence[FailureRow]
    store: Mapping[str, int]
    quota: int
    problems: Mapping[str, str | None]
    notes: Sequence[str] = ()


def sections(known: Known, running: Sequence[RunningBuild]) -> dict[str, Tag]:
    """Returns all sections by name, in the page's order."""
    return {
        "state": state(known.problems, known.notes),
        "summary": summary(known, running),
        "builds": builds(running, known.clock),
        "saved": section("saved", "Bytes saved", saved_over_time(known.served, known.now)),
        "deltas": recent(known.recent, known.now),
        "failures": failures(known.failures, known.now),
        "store": store(known),
    }


def state(problems: Mapping[str, str | None], notes: Sequence[str] = ()) -> Tag:
    """Returns one line: whether the server can do its work, and notes for operators."""
    wrong = [f"{part}: {why}" for part, why in problems.items() if why is not None]
    words = "Not ready. " + " · ".join(map(number_format.shown, wrong)) if wrong else "Ready"
    words = " · ".join([words, *map(number_format.shown, notes)])
    return tags.p(
        tags.span(class_="dot"), words, id="state", class_="bad" if wrong else "good", role="status"
    )


def summary(known: Known, running: Sequence[RunningBuild]) -> Tag:
    """Returns the section of the main figures."""
    full, delta, count = (
        sum(known.counters.get(f"served.{kind}.{what}", 0) for kind in ("v2", "v3"))
        for what in ("full_bytes", "delta_bytes", "deltas")
    )
    waiting = sum(build.started is None for build in running)
    return section(
        "summary",
        "Since the beginning",
        cards(
            (
                "Saved",
                number_format.size(full - delta),
                f"{number_format.share(full - delta, full)} of {number_format.size(full)}",
            ),
            ("Deltas served", number_format.number(count), f"{number_format.size(delta)} sent"),
            (
                "Deltas kept",
                number_format.number(known.totals.deltas),
                number_format.size(known.totals.blob_bytes),
            ),
            (
                "Builds now",
                number_format.number(len(running) - waiting),
                f"{number_format.number(waiting)} wait for their turn",
            ),
            ("Devices now", number_format.number(known.devices), "with a request under way"),
        ),
    )


def builds(running: Sequence[RunningBuild], now: float) -> Tag:
    """Returns the section of queued and running builds."""
    if not running:
        return section(
            "builds",
            "Builds under way",
            tags.p("None. A build starts when a device asks.", class_="none"),
        )
    rows: list[list[Piece]] = [
        [
            _repositories(build.pair.base.repository, build.pair.target.repository),
            build.pair.kind,
            _progress(build),
            number_format.duration(now - (build.since if build.started is None else build.started)),
            number_format.number(len(build.waiters)),
        ]
        for build in sorted(running, key=lambda build: build.started is None)[:MOST_BUILDS]
    ]
    more = len(running) - len(rows)
    return section(
        "builds",
        "Builds under way",
        table(
            "Builds under way, then those that wait, oldest first",
            ["Target", "Kind", "Progress", "Time", "Waiting"],
            rows,
            numeric=(3, 4),
        ),
        tags.p(f"And {number_format.number(more)} more that wait.") if more else "",
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


def recent(rows: Sequence[DeltaRow], now: float) -> Tag:
    """Returns the section of the newest deltas."""
    if not rows:
        return section("deltas", "Recent deltas", tags.p("None yet.", class_="none"))
    return section(
        "deltas",
        "Recent deltas",
        table(
            "The newest finished deltas; each leads to what made it big",
            ["Target", "Kind", "In full", "Delta", "Saving", "Built in", "Served", "Made"],
            [
                [
                    tags.a(
                        _repositories(row.base_repository, row.target_repository),
                        href=path_of(row.key),
                    ),
                    row.key.kind,
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
    )


def failures(rows: Sequence[FailureRow], now: float) -> Tag:
    """Returns the section of pairs that could not be built, with advice."""
    if not rows:
        return section(
            "failures", "Pairs without a delta", tags.p("None that is remembered.", class_="none")
        )
    return section(
        "failures",
        "Pairs without a delta",
        table(
            "Pairs that could not be built, the latest first",
            ["Target", "Kind", "Why", "What to do", "Times", "Last"],
            [
                [
                    _repositories(row.base_repository, row.target_repository)
                    if row.target_repository
                    else tags.span(
                        short(row.target), tags.small("from ", short(row.base)), class_="pair"
                    ),
                    row.kind,
                    tags.span(number_format.shown(row.reason), class_="reason"),
                    tags.span(advice(row), class_="reason"),
                    number_format.number(row.count),
                    moment(row.last, now),
                ]
                for row in rows
            ],
            numeric=(4, 5),
        ),
    )


def store(known: Known) -> Tag:
    """Returns the section of the store's quota."""
    return section("store", "Store", use_of_store(known.store, known.quota))


def path_of(key: DeltaKey) -> str:
    """Returns the path of a delta's page."""
    return quote(f"/pairs/{key.kind}/{key.recipe}/{key.base.hex}/{key.target.hex}")


def _repositories(base: str, target: str) -> Tag:
    if base == target:
        return tags.span(name(target), class_="pair")
    return tags.span(name(target), tags.small("from ", name(base)), class_="pair")
