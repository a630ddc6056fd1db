"""HTML building blocks of the pages: documents, sections, tables, cards. twisted.web.template
escapes all strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from twisted.web.template import Tag, flattenString, tags

from obdelta import __version__
from obdelta.oci import Digest
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.routes import Whole

Piece = Tag | str
"""A part of a page."""
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src"
        " 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


async def fragment(*pieces: Piece) -> str:
    """Returns the pieces as HTML."""
    return (await flattenString(None, [*pieces])).decode("utf-8")


async def document(title: str, *content: Piece, live: bool = False) -> Whole:
    """Returns a whole page. ``live`` adds the script; without scripts the page reloads every ten
    seconds.
    """
    head = [
        tags.meta(charset="utf-8"),
        tags.title(title),
        tags.meta(name="viewport", content="width=device-width, initial-scale=1"),
        tags.meta(name="color-scheme", content="light dark"),
        tags.link(rel="stylesheet", href="/pages/page.css"),
        tags.link(rel="icon", href="/pages/icon.svg", type="image/svg+xml"),
    ]
    if live:
        head.append(tags.script(src="/pages/live.js", defer="defer"))
        head.append(tags.noscript(tags.meta(**{"http-equiv": "refresh", "content": "10"})))
    page = tags.html(
        tags.head(*head),
        tags.body(
            tags.a("Skip to content", href="#content", class_="skip"),
            tags.header(
                tags.a(
                    Tag(
                        "img", {"src": "/pages/icon.svg", "alt": "", "width": "28", "height": "28"}
                    ),
                    "obdelta",
                    href="/",
                    class_="brand",
                ),
                tags.nav(
                    tags.a("Metrics", href="/metrics"),
                    tags.a("Readiness", href="/readyz"),
                    tags.a("API", href="/openapi.yaml"),
                    **{"aria-label": "Other pages"},
                ),
            ),
            Tag("main", {"id": "content"}, [*content]),
            tags.footer(f"obdelta {__version__}"),
        ),
        lang="en",
    )
    return Whole(
        ("<!DOCTYPE html>\n" + await fragment(page)).encode(),
        "text/html; charset=utf-8",
        headers=HEADERS,
    )


def section(name: str, heading: str, *content: Piece) -> Tag:
    """Returns a part of a page that events may replace by its name."""
    return tags.section(
        tags.h2(heading, id=f"{name}-heading"),
        *content,
        id=name,
        **{"aria-labelledby": f"{name}-heading"},
    )


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Piece]],
    *,
    numeric: Sequence[int] = (),
) -> Tag:
    """Returns a table that narrow screens display as one card a row. The first cell is the row's
    heading.
    """

    def cell(index: int, content: Piece) -> Tag:
        made = (
            tags.th(content, scope="row", role="rowheader")
            if index == 0
            else tags.td(content, role="cell")
        )
        return made(class_="number" if index in numeric else "", **{"data-label": columns[index]})

    head = [
        tags.th(name, scope="col", role="columnheader", class_="number" if index in numeric else "")
        for index, name in enumerate(columns)
    ]
    return tags.table(
        tags.caption(caption),
        tags.thead(tags.tr(*head, role="row"), role="rowgroup"),
        tags.tbody(
            *(
                tags.tr(*(cell(index, content) for index, content in enumerate(row)), role="row")
                for row in rows
            ),
            role="rowgroup",
        ),
        role="table",
    )


def cards(*items: tuple[str, str, str]) -> Tag:
    """Returns figures, each with a name and a line below it."""
    return tags.dl(
        *(
            tags.div(tags.dt(name), tags.dd(tags.strong(figure), tags.span(note)))
            for name, figure, note in items
        ),
        class_="cards",
    )


def name(text: str) -> Tag:
    """Returns an untrusted name. It may break anywhere, and its text direction does not affect the
    text around it.
    """
    return Tag("bdi", {"class": "name"}, [number_format.shown(text)])


def short(digest: Digest) -> Tag:
    """Returns the start of a digest, with the whole digest as a tooltip."""
    return tags.code(digest.hex[:12], title=str(digest))


def moment(when: float, now: float) -> Tag:
    """Returns a time relative to ``now``, with the absolute time as tooltip and machine-readable
    value.
    """
    at = datetime.fromtimestamp(when, UTC)
    return tags.time(
        number_format.ago(now - when),
        datetime=at.isoformat(),
        title=at.strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def svg(name_: str, *content: Piece, **attributes: str) -> Tag:
    """Returns an SVG element; underscores in attributes become hyphens."""
    return Tag(
        name_,
        {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()},
        [*content],
    )
