"""Client of openBalena's API: reads rows of its OData resources, page by page.

The token goes to the configured host only: no redirect is followed. Everything is bounded: the time
of a request, the bytes and values of a page, the number of pages, and the bytes of all of them.

Source: open-balena-api 49.0.12, ``src/balena.sbvr`` and ``src/infra/auth``; PineJS's OData.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from twisted.internet.defer import ensureDeferred
from twisted.web.http_headers import Headers

from obdelta import __version__
from obdelta.concurrency.limits import in_time
from obdelta.concurrency.reactor import IReactor
from obdelta.concurrency.tasks import Threads
from obdelta.errors import ApiRefused, ApiUnavailable, TooManyRequests, UpstreamUnavailable
from obdelta.registry.http.tls import Trust, make_agent, read_bundle
from obdelta.registry.http.transport import Http, HttpResponse
from obdelta.registry.http.transport_errors import TransientUpstreamError
from obdelta.registry.requests import Backoff, Retrier

VERSION = "v7"
"""The version of the API whose names are used here; open-balena-api serves it since 2023."""
PAGE = 100
"""Rows that are requested at a time."""
MAX_PAGES = 1000
MAX_BODY, MAX_BYTES = 8 << 20, 64 << 20
"""Bytes of one page, and of all pages of a resource."""
MAX_VALUES = 200_000
"""Objects and lists of one page. Each takes more memory than its two bytes."""
IDLE = 20.0
"""Seconds without data after which a request counts as failed."""
REQUEST_SECONDS = 60.0
"""Seconds for one page, its retries included."""
BACKOFF = Backoff(attempts=3, first=0.5, most=5.0, max_retry_after=30.0, time_limit=30.0)
MAX_TOKEN = 8192

Row = Mapping[str, Any]
ReadToken = Callable[[], Awaitable[str]]


class ApiClient:
    """Reads from the API at ``base`` (scheme and host). ``token`` returns the present token."""

    def __init__(self, base: str, http: Http, clock: IReactor, token: ReadToken) -> None:
        self._base, self._http, self._clock, self._token = base, http, clock, token

    @classmethod
    def connect(
        cls, reactor: IReactor, base: str, token: ReadToken, ca: Path | None = None
    ) -> ApiClient:
        """Returns a client with connections of its own. ``ca``: a PEM bundle that signs the API;
        None: the system's authorities. Raises SettingsError.
        """
        host = urlsplit(base).hostname or ""
        agent, pool = make_agent(reactor, Trust(host, None if ca is None else read_bundle(ca)))
        return cls(base, Http(agent, reactor, idle=IDLE, pool=pool), reactor, token)

    async def rows(self, resource: str, **options: str) -> AsyncIterator[Row]:
        """Yields all rows of a resource, ordered by ``id``, which ``select`` must name.

        ``options`` are OData's without the dollar sign: ``select``, ``filter``, ``expand``. Raises
        ApiRefused, ApiUnavailable.
        """
        last, length, wanted = 0, 0, options.get("filter", "")
        for _ in range(MAX_PAGES):
            # By ID, not by $skip: rows that come and go meanwhile shift no page.
            after = f"id gt {last}" + (f" and ({wanted})" if wanted else "")
            page, size = await self._page(
                resource, {**options, "filter": after, "orderby": "id asc", "top": str(PAGE)}
            )
            length += size
            if length > MAX_BYTES:
                raise ApiUnavailable(f"its rows of {resource} have more than {MAX_BYTES} bytes")
            for row in page:
                yield row
            for row in page:
                # Otherwise a page could leave out rows, or come again and again.
                if (found := number(row, "id")) <= last:
                    raise ApiUnavailable(f"its rows of {resource} are not sorted by their IDs")
                last = found
            if len(page) < PAGE:
                return
        raise ApiUnavailable(f"it has more than {MAX_PAGES * PAGE} rows of {resource}")

    async def page(self, resource: str, **options: str) -> list[Row]:
        """Returns the rows of one request. Raises ApiRefused, ApiUnavailable."""
        return (await self._page(resource, options))[0]

    async def _page(self, resource: str, options: Mapping[str, str]) -> tuple[list[Row], int]:
        """Returns the rows of one request, and its bytes."""
        query = "&".join(
            f"${name}={quote(value, safe='$(),;/:=')}" for name, value in options.items()
        )
        url = f"{self._base}/{VERSION}/{resource}?{query}"
        retrier = Retrier(BACKOFF, self._clock)
        try:
            rows, size = await in_time(
                ensureDeferred(retrier.call(lambda: self._get(url))),
                REQUEST_SECONDS,
                self._clock,
                lambda: ApiUnavailable(f"no answer within {REQUEST_SECONDS:g} seconds"),
            )
        except UpstreamUnavailable as error:
            raise ApiUnavailable(error.why) from error
        except TooManyRequests as error:
            raise ApiUnavailable(error.why) from error
        if len(rows) > (most := int(options.get("top", PAGE))):
            raise ApiUnavailable(f"it answers with more than the {most} rows that were asked for")
        return rows, size

    async def _get(self, url: str) -> tuple[list[Row], int]:
        headers = Headers(
            {
                b"accept": [b"application/json"],
                b"authorization": [b"Bearer " + (await self._token()).encode("ascii")],
                b"user-agent": [f"obdelta/{__version__}".encode("ascii")],
            }
        )
        response = await self._http.request(b"GET", url, headers)
        if response.status != 200:
            await response.discard()
            raise _refusal(response)
        body = await response.content(MAX_BODY)
        if body is None:
            raise ApiUnavailable(f"a page has more than {MAX_BODY} bytes")
        if body.count(b"{") + body.count(b"[") > MAX_VALUES:
            raise ApiUnavailable(f"a page has more than {MAX_VALUES} objects and lists")
        try:
            rows = json.loads(body)["d"]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise TypeError("rows are expected")  # one less would look like the last page
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ApiUnavailable(
                f"{response.host} did not answer with rows: is api-url an openBalena API?"
            ) from error
        return rows, len(body)

    async def close(self) -> None:
        """Closes idle connections."""
        await self._http.close()


def _refusal(response: HttpResponse) -> Exception:
    status, host = response.status, response.host
    if status in (401, 403):
        return ApiRefused(
            f"{host} answers {status}: api-token is wrong, has expired, or may not read this:"
            " give it a new one"
        )
    if status == 429:
        return TooManyRequests(f"{host} limits our requests", response.retry_after())
    if 300 <= status < 400:
        return ApiUnavailable(f"{host} redirects, and is not followed: correct api-url")
    if status == 404:
        return ApiUnavailable(f"{host} has no /{VERSION}: it is too old, or no openBalena API")
    if status >= 500:
        return TransientUpstreamError(f"{host} answers {status}")
    return ApiUnavailable(f"{host} answers {status}")


def token_reader(given: Path | str, threads: Threads) -> ReadToken:
    """Returns a function that returns the token. If a path is given, the file is read each time, so
    that a new token needs no restart. The function raises ApiRefused.
    """

    def read() -> str:
        if isinstance(given, str):
            return given
        try:
            with given.open("rb") as file:
                token = file.read(MAX_TOKEN).decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ApiRefused("the file of api-token cannot be read: check its path") from error
        if not token or not token.isprintable() or " " in token:
            raise ApiRefused("the file of api-token has no token in it")
        return token

    return lambda: threads.run(read)


# -- fields of untrusted rows


def number(row: Row, name: str) -> int:
    """Returns a whole number of a row. Raises ApiUnavailable."""
    value = row.get(name)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ApiUnavailable(f"a row has no number {name}")
    return value


def text(row: Row, name: str) -> str:
    """Returns a text of a row, "" if it is null. Raises ApiUnavailable."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ApiUnavailable(f"a row has no text {name}")
    return value or ""


def related(row: Row, name: str) -> list[Row]:
    """Returns the expanded rows of a relation. Raises ApiUnavailable."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ApiUnavailable(f"a row has no expanded {name}")
    return value


def quoted(value: str) -> str:
    """Returns a text as OData writes it in a filter."""
    return "'" + value.replace("'", "''") + "'"
