"""Traces of devices' requests: the last ones in memory, why some were refused, and to whom.

Every bound is fixed, so requests of many clients cost no more memory than those of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from twisted.logger import Logger

from obdelta.concurrency.expiring_map import LruMap
from obdelta.json_records import known_fields

log = Logger(namespace="obdelta.web.devices.app")
"""The lines are in the log area of requests."""

REFUSALS: Final = frozenset((401, 403, 404))
"""The statuses whose reason is logged."""
MAX_TRACES: Final = 4096
"""Requests that are remembered; refused ones are remembered apart, up to a quarter as many."""
MAX_REFUSED: Final = 256
"""Clients whose refusals are counted."""
MAX_UNSENT: Final = 500
"""Requests of another server process in one report to the first process."""
_MAX_TEXT = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One request that has ended. ``when`` is its end in seconds UTC.

    ``subject`` is that of a token whose signature is valid, else "". ``token``: whether the request
    had credentials at all. ``image`` is what was requested, ``path`` has no query, ``end`` is
    ``done`` or ``cut``. ``reason`` is set for refused requests.
    """

    when: float
    request: str
    peer: str
    subject: str
    token: bool
    method: str
    path: str
    image: str
    status: int
    bytes: int
    seconds: float
    end: str
    reason: str = ""

    @property
    def client(self) -> str:
        """The token's subject, else the address."""
        return self.subject or self.peer


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedClient:
    """A client with ``count`` refused requests since ``first``, and the last of them."""

    first: float
    count: int
    last: RequestTrace


class RequestTraces:
    """The last requests, newest last.

    The other server processes send their traces to the first one: see :meth:`unsent`.
    """

    def __init__(self, now: Callable[[], float], most: int = MAX_TRACES) -> None:
        """``now`` returns seconds UTC."""
        self.now = now
        self._requests: deque[RequestTrace] = deque(maxlen=most)
        self._refusals: deque[RequestTrace] = deque(maxlen=most // 4)
        self._clients: LruMap[str, RefusedClient] = LruMap(MAX_REFUSED)
        self._reasons: LruMap[str, str] = LruMap(most // 4)
        """Reasons by request, for requests that another process has forwarded."""
        self._unsent: deque[RequestTrace] = deque(maxlen=MAX_UNSENT)

    def refused(self, trace: RequestTrace) -> None:
        """Logs why a request was refused, and counts it for its client."""
        log.info(
            "refused: status={status} subject={subject} peer={peer} image={image} reason={reason}",
            status=trace.status,
            subject=trace.subject or "-",
            peer=trace.peer or "-",
            image=trace.image or "-",
            reason=trace.reason,
            request=trace.request,
        )
        self._reasons.set(trace.request, trace.reason)
        self._count(trace)

    def _count(self, trace: RequestTrace) -> None:
        # The first request of a pull has no token: it asks where to get one. Scanners ask for
        # other paths.
        if not trace.token and (trace.status != 404 or not trace.image):
            return
        known = self._clients.get(trace.client)
        first, count = (trace.when, 0) if known is None else (known.first, known.count)
        self._clients.set(trace.client, RefusedClient(first=first, count=count + 1, last=trace))

    def add(self, trace: RequestTrace) -> None:
        """Remembers a request that has ended."""
        self._unsent.append(trace)
        if not trace.reason:
            reason = self._reasons.peek(trace.request) if trace.status in REFUSALS else None
            trace = replace(trace, reason=reason or "")
        (self._refusals if trace.status in REFUSALS else self._requests).append(trace)

    def find(self, name: str) -> list[RequestTrace]:
        """Returns the known requests with this ID, of this subject or from this address, newest
        first. A device's UUID stands for its subject.
        """
        wanted = {name, f"d_{name}"}
        return sorted(
            (
                trace
                for traces in (self._requests, self._refusals)
                for trace in traces
                if trace.request == name or trace.subject in wanted or trace.peer == name
            ),
            key=lambda trace: -trace.when,
        )

    def refused_clients(self) -> list[RefusedClient]:
        """Returns the clients whose requests were refused, the last refused first."""
        return sorted(self._clients.values(), key=lambda client: -client.last.when)

    # -- several server processes

    def unsent(self) -> list[dict[str, Any]]:
        """Returns what was added since the last call, at most :data:`MAX_UNSENT` requests."""
        found = [asdict(trace) for trace in self._unsent]
        self._unsent.clear()
        return found

    def absorb(self, traces: Iterable[Mapping[str, Any]]) -> None:
        """Adds the requests of another process. Raises ValueError if they are not traces."""
        try:
            read = [RequestTrace(**known_fields(RequestTrace, trace)) for trace in traces]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("they are no traces of requests") from error
        for trace in read:
            if trace.reason:
                self._count(trace)
            self.add(trace)


def bounded(text: str) -> str:
    """Returns untrusted text as ASCII of a bounded length."""
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= _MAX_TEXT else shown[: _MAX_TEXT - 1] + "…"
