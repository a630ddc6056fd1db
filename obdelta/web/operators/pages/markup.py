"""HTML building blocks of the pages: documents, sections, tables, cards. twisted.web.template
escapes all strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from twisted.web.template import Tag, flattenString, tags

from obdelta import __version__
from obdelta.oci import Digest, ImageNames
from obdelta.store.catalogue.records import DeltaKey
from obdelta.web.operators.deltas_api import NO_NAMES
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.routes import Whole

Piece = Tag | str
"""A part of a page."""
PAGES = (
    ("Status", "/"),
    ("Deltas", "/deltas"),
    ("Fleets", "/fleets"),
    ("Help", "/help"),
    ("Metrics", "/metrics"),
    ("Readiness", "/readyz"),
    ("API", "/openapi.yaml"),
)
"""Links in the head of each page."""
ICON, ALERT_ICON = "/pages/icon.svg", "/pages/alert.svg"
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src"
        " 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}
"""Pages have this header besides those of every answer: it names what they may load."""


async def fragment(*pieces: Piece) -> str:
    """Returns the pieces as HTML."""
    return (await flattenString(None, [*pieces])).decode("utf-8")


async def document(
    title: str, *content: Piece, live: str = "", icon: str = ICON, at: str = ""
) -> Whole:
    """Returns a whole page. ``live``: the path of events by which a script updates the page;
    without scripts it reloads every ten seconds. ``at`` is the page's own path, if its head has
    a link to it.
    """
    head = [
        tags.meta(charset="utf-8"),
        tags.title(title),
        tags.meta(name="viewport", content="width=device-width, initial-scale=1"),
        tags.meta(name="color-scheme", content="light dark"),
        tags.link(rel="stylesheet", href="/pages/page.css"),
        tags.link(rel="icon", href=icon, type="image/svg+xml"),
        tags.script(src="/pages/live.js", defer="defer"),
    ]
    if live:
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
                tags.form(
                    Tag(
                        "input",
                        {
                            "type": "search",
                            "name": "search",
                            "placeholder": "Fleet, release, image, ID",
                            "aria-label": "Search deltas",
                            "maxlength": "200",
                        },
                    ),
                    tags.button("Search"),
                    action="/deltas",
                    role="search",
                ),
                tags.nav(
                    *(
                        tags.a(text, href=href, **({"aria-current": "page"} if href == at else {}))
                        for text, href in PAGES
                    ),
                    **{"aria-label": "Other pages"},
                ),
            ),
            Tag("main", {"id": "content"}, [*content]),
            tags.footer(f"obdelta {__version__}"),
        ),
        lang="en",
        **({"data-live": live} if live else {}),
    )
    return Whole(
        ("<!DOCTYPE html>\n" + await fragment(page)).encode(),
        "text/html; charset=utf-8",
        headers=HEADERS,
    )


def section(name: str, heading: str, *content: Piece, class_: str = "") -> Tag:
    """Returns a part of a page that events may replace by its name."""
    return tags.section(
        tags.h2(heading, id=f"{name}-heading"),
        *content,
        id=name,
        class_=class_,
        **{"aria-labelledby": f"{name}-heading"},
    )


def empty(name: str, heading: str, words: str) -> Tag:
    """Returns a section that has nothing to display: one line."""
    return section(name, heading, tags.p(words, class_="none"), class_="empty")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Piece]],
    *,
    numeric: Sequence[int] = (),
    heads: Sequence[Piece] | None = None,
    ordered: int | None = None,
) -> Tag:
    """Returns a table that narrow screens display as one card a row. The first cell is the row's
    heading. ``heads`` are the columns' headings if they are more than text; the rows are in the
    order of the column ``ordered``, the greatest first.
    """

    def cell(index: int, content: Piece) -> Tag:
        made = (
            tags.th(content, scope="row", role="rowheader")
            if index == 0
            else tags.td(content, role="cell")
        )
        return made(class_="number" if index in numeric else "", **{"data-label": columns[index]})

    head = [
        tags.th(
            name,
            scope="col",
            role="columnheader",
            class_="number" if index in numeric else "",
            **({"aria-sort": "descending"} if index == ordered else {}),
        )
        for index, name in enumerate(columns if heads is None else heads)
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
    return Tag("bdi", {"class": "name"}, [number_format.visible(text)])


def path(text: str) -> Tag:
    """Returns the path of a file, its directory less prominent than its name."""
    folder, slash, file = number_format.visible(text).rpartition("/")
    return Tag("bdi", {"class": "name"}, [tags.span(folder + slash, class_="folder"), file])


def pair(
    base: str,
    target: str,
    names: Mapping[Digest, ImageNames] = NO_NAMES,
    *,
    of: tuple[Digest, Digest] | None = None,
    digest: bool = False,
) -> Tag:
    """Returns what a pair's images call themselves, or their repositories; one of them if they
    are the same. ``of``: the digests of the base and the target. ``digest`` displays the base's.
    """
    base_names, target_names = (None, None) if of is None else (names.get(one) for one in of)
    lines: list[Piece] = [image(target, target_names)]
    if digest or base_names or base != target:
        which: Piece = name(str(base_names) if base_names else base)
        known = (" ", short(of[0])) if digest and of is not None else ()
        lines.append(tags.small("from ", which, *known))
    return tags.span(*lines, class_="pair")


def image(repository: str, names: ImageNames | None) -> Tag:
    """Returns what an image calls itself, and its repository below that; else the repository."""
    if not names:
        return name(repository)
    return tags.span(name(str(names)), tags.small(name(repository)), class_="pair")


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


def picture(title: str, width: int, height: int, *drawn: Tag, **attributes: str) -> Tag:
    """Returns an SVG picture of this size. ``title`` describes it to those who cannot see it."""
    return svg(
        "svg",
        svg("title", title),
        *drawn,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=title,
        **attributes,
    )


def folded(name: str, label: str, summary: str, *content: Piece) -> Tag:
    """Returns a section without a heading that can be unfolded, and that events may replace."""
    return tags.section(
        tags.details(tags.summary(summary), *content, id=f"{name}-details"),
        id=name,
        **{"aria-label": label},
    )


def kind_of(key: DeltaKey) -> str:
    """Returns a delta's kind, with the form of a v3 delta."""
    return key.kind if key.kind == "v2" else f"{key.kind}\N{NO-BREAK SPACE}{key.form.value}"
