"""All metric families with their labels and units, as in the table of ``docs/metrics.md``.

No label has a value for each device, image or pair. A server of a million of them exports no more
than before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from obdelta import __version__
from obdelta.observability.metrics_merge import Merging, Snapshot

_REQUEST_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    900.0,
)
_BUILD_SECONDS = (
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
    3600.0,
)

Refresh = Callable[[], Awaitable[None]]


class Metrics:
    """The metrics of one server, or of one of its processes.

    They live on the reactor thread; counting costs some microseconds a request. Values that need a
    look-up are refreshed before a read: register a function with :meth:`before_reading`. With
    several processes one reads for all: it passes the others' :meth:`snapshot` to :meth:`absorb`.
    """

    def __init__(self) -> None:
        self._own = own = CollectorRegistry(auto_describe=False)
        self._asking: list[Refresh] = []
        self.requests = Counter(
            "obdelta_http_requests",
            "Requests answered.",
            ["endpoint", "route", "status"],
            registry=own,
        )
        self.request_seconds = Histogram(
            "obdelta_http_request_duration_seconds",
            "From the last byte of a request to the last byte of its answer.",
            ["endpoint", "route"],
            buckets=_REQUEST_SECONDS,
            registry=own,
        )
        self.response_bytes = Counter(
            "obdelta_http_response_bytes",
            "Bytes of bodies that were sent.",
            ["endpoint", "route"],
            registry=own,
        )
        self.connections = Gauge(
            "obdelta_http_connections", "Open connections.", ["endpoint"], registry=own
        )
        self.devices = Gauge(
            "obdelta_devices_connected",
            "Devices (subjects of tokens, else addresses) with a request.",
            registry=own,
        )
        self.answers = Counter(
            "obdelta_delta_answers",
            "Answers to requests for deltas.",
            ["kind", "answer"],
            registry=own,
        )
        self.builds = Counter(
            "obdelta_builds", "Builds that ended.", ["kind", "outcome", "reason"], registry=own
        )
        self.build_seconds = Histogram(
            "obdelta_build_duration_seconds",
            "Builds that led to a delta, without their wait in the queue.",
            ["kind"],
            buckets=_BUILD_SECONDS,
            registry=own,
        )
        self.stage_seconds = Histogram(
            "obdelta_build_stage_duration_seconds",
            "Their stages; those of the layers of one build are summed up.",
            ["kind", "stage"],
            buckets=_BUILD_SECONDS,
            registry=own,
        )
        self.delta_faults = Counter(
            "obdelta_delta_faults",
            "Finished layers that show a fault in the search.",
            ["fault"],
            registry=own,
        )
        self.build_wait = Histogram(
            "obdelta_build_wait_seconds",
            "Builds in the queue.",
            buckets=_BUILD_SECONDS,
            registry=own,
        )
        self.running = Gauge("obdelta_builds_running", "Builds under way.", registry=own)
        self.queued = Gauge(
            "obdelta_builds_queued", "Builds that wait for their turn.", registry=own
        )
        self.cache_requests = Counter(
            "obdelta_cache_requests",
            "What builds wanted from the caches.",
            ["cache", "result"],
            registry=own,
        )
        self.workers = Gauge("obdelta_workers", "Worker processes that are alive.", registry=own)
        self.worker_memory = Gauge(
            "obdelta_worker_resident_memory_bytes",
            "Resident memory of all worker processes.",
            registry=own,
        )
        self.worker_peak = Gauge(
            "obdelta_worker_peak_resident_memory_bytes",
            "The most that one worker had, seen at a v3 build's end.",
            registry=own,
        )
        self._most = 0
        self.upstream_requests = Counter(
            "obdelta_upstream_requests", "Answers of the upstream.", ["status"], registry=own
        )
        self.upstream_errors = Counter(
            "obdelta_upstream_errors",
            "Requests to the upstream that got no answer.",
            ["reason"],
            registry=own,
        )
        self.store_bytes = Gauge(
            "obdelta_store_bytes", "Bytes on the disk.", ["kind"], registry=own
        )
        self.store_quota = Gauge(
            "obdelta_store_quota_bytes", "What they may take.", ["kind"], registry=own
        )
        self.store_deltas = Gauge("obdelta_store_deltas", "Finished deltas.", registry=own)
        self.log_messages = Counter(
            "obdelta_log_messages", "Messages logged.", ["level"], registry=own
        )
        self.info = Gauge(
            "obdelta_info", "Always 1; the version is in the label.", ["version"], registry=own
        )
        self.info.labels(__version__).set(1)
        self._tallies = _Tallies()
        own.register(self._tallies)
        self._merging = Merging(own)
        self._exported = CollectorRegistry(auto_describe=False)
        self._exported.register(self._merging)
        ProcessCollector(registry=self._exported)

    def request_ended(
        self, endpoint: str, route: str, status: int, seconds: float, size: int
    ) -> None:
        """Records one request, however it ended. ``route`` is a pattern, ``size`` is in bytes."""
        self.requests.labels(endpoint, route, str(status)).inc()
        self.request_seconds.labels(endpoint, route).observe(seconds)
        self.response_bytes.labels(endpoint, route).inc(size)

    def cache_asked(self, cache: str, hit: bool) -> None:
        """Records one look-up in a cache."""
        self.cache_requests.labels(cache, "hit" if hit else "miss").inc()

    def layers_matched(self, kept: int, made: int, peak: int) -> None:
        """Records a worker's delta: the match indexes of base layers that it found and made, and
        its peak memory in bytes.
        """
        self.cache_requests.labels("indexes", "hit").inc(kept)
        self.cache_requests.labels("indexes", "miss").inc(made)
        self._most = max(self._most, peak)
        self.worker_peak.set(self._most)

    def upstream_answered(self, status: int) -> None:
        """Records one answer of the upstream. Redirects and retries count separately."""
        self.upstream_requests.labels(str(status)).inc()

    def upstream_failed(self, reason: str) -> None:
        """Records one request without an answer. ``reason`` is one of a few words."""
        self.upstream_errors.labels(reason).inc()

    def set_tallies(self, counters: Mapping[str, int]) -> None:
        """Sets the catalogue's counters, ``area.name`` to count. They outlive the process."""
        self._tallies.values = dict(counters)

    def before_reading(self, refresh: Refresh) -> None:
        """Registers a function that is awaited before :meth:`text`. It should refresh gauges."""
        self._asking.append(refresh)

    async def text(self, accept: str = "") -> tuple[str, bytes]:
        """Returns content type and body, in Prometheus' text format or OpenMetrics, as the header
        ``accept`` requests.
        """
        for refresh in self._asking:
            await refresh()
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._exported)

    def connected_devices(self) -> int:
        """Returns the number of connected devices in all processes."""
        return int(self._merging.value("obdelta_devices_connected"))

    def snapshot(self) -> Snapshot:
        """Returns this process's values for JSON. They are sums since its start, so absorbing one
        twice does no harm.
        """
        return self._merging.snapshot()

    def absorb(self, source: str, snapshot: Snapshot) -> None:
        """Replaces another process's values. Raises ValueError for an invalid snapshot."""
        self._merging.absorb(source, snapshot)

    def retire(self, source: str) -> None:
        """Marks a process as ended: its counters stay, its gauges go."""
        self._merging.retire(source)


class _Tallies(Collector):
    """The catalogue's counters as metric families."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        """Yields families for ``served.<kind>.<what>``. All other counters are events."""
        served = {
            "deltas": CounterMetricFamily(
                "obdelta_served_deltas", "Deltas given to devices.", labels=["kind"]
            ),
            "full_bytes": CounterMetricFamily(
                "obdelta_served_full_bytes", "What their targets would have taken.", labels=["kind"]
            ),
            "delta_bytes": CounterMetricFamily(
                "obdelta_served_delta_bytes", "What they took.", labels=["kind"]
            ),
        }
        events = CounterMetricFamily(
            "obdelta_events", "The catalogue's tallies.", labels=["area", "event"]
        )
        for kind in ("v2", "v3"):
            for what, family in served.items():
                family.add_metric([kind], self.values.get(f"served.{kind}.{what}", 0))
        for name, value in sorted(self.values.items()):
            area, _, event = name.partition(".")
            if area != "served":
                events.add_metric([area, event], value)
        return [*served.values(), events]
