"""What pages are put together from. Strings are escaped by twisted.web.template; nothing here
writes markup itself.
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
"""What stands in a page."""
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
    """As HTML."""
    return (await flattenString(None, [*pieces])).decode("utf-8")


async def document(title: str, *content: Piece, live: bool = False) -> Whole:
    """A whole page. ``live``: with the script, and reloaded every ten seconds where scripts are
    off.
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
    """A part of a page that events may replace by its name."""
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
    """A table that narrow screens show as one card a row; the first cell is the row's heading."""

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
    """Figures: a name, the figure, and a line below it."""
    return tags.dl(
        *(
            tags.div(tags.dt(name), tags.dd(tags.strong(figure), tags.span(note)))
            for name, figure, note in items
        ),
        class_="cards",
    )


def name(text: str) -> Tag:
    """A name that somebody else chose; its direction does not reach the text around it, and it may
    break anywhere.
    """
    return Tag("bdi", {"class": "name"}, [number_format.shown(text)])


def short(digest: Digest) -> Tag:
    """The head of a digest; the whole of it for pointers."""
    return tags.code(digest.hex[:12], title=str(digest))


def moment(when: float, now: float) -> Tag:
    """A time as its distance; the time itself for pointers and machines."""
    at = datetime.fromtimestamp(when, UTC)
    return tags.time(
        number_format.ago(now - when),
        datetime=at.isoformat(),
        title=at.strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def svg(name_: str, *content: Piece, **attributes: str) -> Tag:
    """An SVG element; underscores in attributes are hyphens."""
    return Tag(
        name_,
        {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()},
        [*content],
    )
