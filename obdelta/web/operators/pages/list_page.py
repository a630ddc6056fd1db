"""The page of all deltas, builds and failures: search, filters, orders, pages and buttons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from twisted.web.template import Tag, tags

from obdelta.oci import Digest, Form, ImageNames
from obdelta.store.catalogue.listed_deltas import SORTS, ListedDelta
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.markup import Piece, kind_of, moment, pair, table
from obdelta.web.operators.pages.plot import share_bar
from obdelta.web.operators.pages.sections.action_forms import ActionForms
from obdelta.web.operators.pages.status_page import path_of

STATES = ("kept", "pinned", "building", "queued", "failed", "skipped")
_ORDERS = {
    "newest": "Newest",
    "size": "Largest",
    "saved": "Most saved",
    "served": "Most served",
    "used": "Last served",
}


def content(
    found: Sequence[ListedDelta],
    query: Mapping[str, str],
    fleets: Mapping[str, str],
    following: str | None,
    now: float,
    forms: ActionForms,
    names: Mapping[Digest, ImageNames],
) -> list[Tag]:
    """Returns the page below its heading bar. ``query``: the filters and the order.

    ``fleets``: repositories that fleets are named after, with the texts to choose from.

    ``following``: where the next page begins. ``names``: what images call themselves.
    """
    pieces = [tags.h1("Deltas"), _filters(query, fleets)]
    if found:
        pieces.append(_table(found, query, now, forms, names))
    else:
        pieces.append(tags.section(tags.p("Nothing matches.", class_="none"), id="found"))
    first = dict(query)
    pages = []
    if first.pop("after", ""):
        pages.append(tags.a("First page", href=_address(first)))
    if following is not None:
        pages.append(tags.a("Next page", href=_address({**query, "after": following}), rel="next"))
    if pages:
        pieces.append(tags.nav(*pages, class_="pages", **{"aria-label": "Pages"}))
    if not forms.enabled:
        pieces.append(
            tags.p(
                "Browsers cannot act here. ",
                tags.a("How to change that", href="/help#acting"),
                class_="lead",
            )
        )
    return pieces


def _address(query: Mapping[str, str]) -> str:
    given = {name: value for name, value in query.items() if value}
    return f"/deltas?{urlencode(given)}" if given else "/deltas"


def _filters(query: Mapping[str, str], fleets: Mapping[str, str]) -> Tag:
    return tags.form(
        tags.label(
            "Search",
            tags.input(
                type="search", name="search", value=query.get("search", ""), maxlength="200"
            ),
        ),
        _choice("State", "state", {"": "All", **{one: one for one in STATES}}, query),
        _choice("Kind", "kind", {"": "All", "v3": "v3", "v2": "v2"}, query),
        _choice("Form", "form", {"": "All", **{form.value: form.value for form in Form}}, query),
        _choice(
            "Fleet",
            "fleet",
            {"": "All", **{one: number_format.visible(text) for one, text in fleets.items()}},
            query,
        ),
        _choice("Order", "sort", {sort: _ORDERS[sort] for sort in SORTS}, query),
        tags.button("Apply"),
        id="filters",
        class_="filters",
        action="/deltas",
        **{"aria-label": "Filters"},
    )


def _choice(label: str, field: str, values: Mapping[str, str], query: Mapping[str, str]) -> Tag:
    chosen = query.get(field, "")
    if chosen and chosen not in values:
        values = {**values, chosen: number_format.visible(chosen)}
    return tags.label(
        label,
        tags.select(
            *(
                tags.option(text, value=value, **({"selected": ""} if value == chosen else {}))
                for value, text in values.items()
            ),
            name=field,
        ),
    )


def _table(
    found: Sequence[ListedDelta],
    query: Mapping[str, str],
    now: float,
    forms: ActionForms,
    names: Mapping[Digest, ImageNames],
) -> Tag:
    back = _address(query)
    columns = ["Target", "State", "Kind", "In full", "Delta", "Saved", "Served", "Last served"]
    sorted_by = {"size": 4, "saved": 5, "served": 6, "used": 7}
    heads: list[Piece] = [*columns]
    for sort, index in sorted_by.items():
        href = _address({**query, "sort": sort, "after": ""})
        heads[index] = tags.a(columns[index], href=href)
    rows = [
        [
            *_row(delta, now, names),
            *([forms.buttons(delta.id, state_of(delta), back)] if forms.enabled else []),
        ]
        for delta in found
    ]
    return tags.section(
        table(
            "Deltas, builds and failures",
            [*columns, *(["Act"] if forms.enabled else [])],
            rows,
            numeric=(3, 4, 5, 6, 7),
            heads=[*heads, *(["Act"] if forms.enabled else [])],
            ordered=sorted_by.get(query.get("sort", "")),
        ),
        id="found",
        **{"aria-label": "Deltas"},
    )


def state_of(delta: ListedDelta) -> str:
    """Returns the state by which buttons are chosen."""
    return "pinned" if delta.pinned else delta.state


def _row(delta: ListedDelta, now: float, names: Mapping[Digest, ImageNames]) -> list[Piece]:
    target = delta.target_repository or f"{delta.key.target}"
    images: Piece = pair(
        delta.base_repository, target, names, of=(delta.key.base, delta.key.target), digest=True
    )
    if delta.state == "kept":
        images = tags.a(images, href=path_of(delta.key))
    state: list[Piece] = [
        tags.span(
            delta.state + (", pinned" if delta.pinned else ""), class_=f"state {delta.state}"
        ),
        " ",
        moment(delta.since, now),
    ]
    if delta.reason:
        state.append(tags.small(number_format.visible(delta.reason)))
    return [
        images,
        tags.span(*state, class_="reason"),
        kind_of(delta.key),
        "–" if delta.full_bytes is None else number_format.size(delta.full_bytes),
        "–"
        if delta.bytes is None
        else tags.span(
            number_format.size(delta.bytes), share_bar(delta.bytes, delta.full_bytes or 0)
        ),
        number_format.size(delta.saved) if delta.served else "–",
        f"{number_format.number(delta.served)}×" if delta.bytes is not None else "–",
        "–" if delta.used is None else moment(delta.used, now),
    ]
