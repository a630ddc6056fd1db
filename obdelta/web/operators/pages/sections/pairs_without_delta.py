"""Sections of pairs without a delta, failed and skipped, and of refused clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from twisted.web.template import Tag, tags

from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.listed_deltas import id_of_failure
from obdelta.store.catalogue.records import FailureRow
from obdelta.web.operators.deltas_api import NO_NAMES
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.markup import (
    empty,
    folded,
    moment,
    name,
    pair,
    section,
    short,
    table,
)
from obdelta.web.operators.pages.sections.action_forms import NO_FORMS, ActionForms
from obdelta.web.request_traces import RefusedClient

MAX_FAILURES = 15
MAX_REFUSED = 25


def failures(
    rows: Sequence[FailureRow],
    now: float,
    forms: ActionForms = NO_FORMS,
    names: Mapping[Digest, ImageNames] = NO_NAMES,
) -> Tag:
    """Returns the section of pairs that could not be built, with advice and buttons."""
    if not rows:
        return empty("failures", "Failed builds", "No failures.")
    columns = ["Target", "Kind", "Why", "Remedy", "Times", "Last"]
    return section(
        "failures",
        "Failed builds",
        table(
            "Pairs that could not be built, the latest first",
            [*columns, *(["Act"] if forms.enabled else [])],
            [
                [
                    _failed_pair(row, names),
                    _kind(row),
                    tags.span(number_format.visible(row.reason), class_="reason"),
                    tags.span(advice(row), class_="reason"),
                    number_format.number(row.count),
                    moment(row.last, now),
                    *([forms.buttons(id_of_failure(row), "failed", "/")] if forms.enabled else []),
                ]
                for row in rows[:MAX_FAILURES]
            ],
            numeric=(4, 5),
        ),
        tags.p(tags.a("All failed builds", href="/deltas?state=failed"), class_="more"),
    )


def skipped(
    rows: Sequence[FailureRow], now: float, names: Mapping[Digest, ImageNames] = NO_NAMES
) -> Tag:
    """Returns the section of pairs without a delta that are no failures; it can be unfolded."""
    if not rows:
        return tags.section(id="skipped", hidden="hidden")
    pairs = "1 pair" if len(rows) == 1 else f"{number_format.number(len(rows))} pairs"
    return folded(
        "skipped",
        "Skipped pairs",
        f"{pairs} without a delta: devices pull these in full",
        tags.p("A normal result, and no failure. ", tags.a("What it means", href="/help#skipped")),
        table(
            "Skipped pairs, the latest first",
            ["Target", "Kind", "Why", "Last"],
            [
                [
                    _failed_pair(row, names),
                    _kind(row),
                    tags.span(number_format.visible(row.reason), class_="reason"),
                    moment(row.last, now),
                ]
                for row in rows[:MAX_FAILURES]
            ],
            numeric=(3,),
        ),
        tags.p(tags.a("All skipped pairs", href="/deltas?state=skipped"), class_="more"),
    )


def _kind(row: FailureRow) -> str:
    return row.kind if row.form is None else f"{row.kind} {row.form.value}"


def _failed_pair(row: FailureRow, names: Mapping[Digest, ImageNames]) -> Tag:
    if row.target_repository:
        return pair(row.base_repository, row.target_repository, names, of=(row.base, row.target))
    return tags.span(short(row.target), tags.small("from ", short(row.base)), class_="pair")


def refused(clients: Sequence[RefusedClient], now: float) -> Tag:
    """Returns the section of clients whose requests were refused; it can be unfolded."""
    if not clients:
        return tags.section(id="refused", hidden="hidden")
    count = "1 client" if len(clients) == 1 else f"{number_format.number(len(clients))} clients"
    return folded(
        "refused",
        "Refused clients",
        f"{count} refused since the start",
        tags.p(
            "Their last requests: ",
            tags.code("obdelta trace CLIENT"),
            ". ",
            tags.a("What to do", href="/help#refused"),
        ),
        table(
            "Refused clients, the latest first",
            ["Client", "Image", "Why", "Status", "Times", "Last"],
            [
                [
                    tags.a(
                        name(client.last.client or "unknown"),
                        href="/api/v1/trace/"
                        + quote(client.last.client, "", errors="backslashreplace"),
                    ),
                    name(client.last.image),
                    tags.span(number_format.visible(client.last.reason), class_="reason"),
                    f"{client.last.status}",
                    number_format.number(client.count),
                    moment(client.last.when, now),
                ]
                for client in clients[:MAX_REFUSED]
            ],
            numeric=(3, 4, 5),
        ),
    )
