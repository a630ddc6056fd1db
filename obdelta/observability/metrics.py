"""All metric families with their labels and units, as in the table of ``docs/metrics.md``.

No label has a value for each device, image or pair, so a server with a million of them exports no
more series.
"""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from obdelta import __version__
from obdelta.observability.metrics_merge import Merging, Snapshot

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
_BUILD_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

MAX_FLEETS = 50
"""Fleets with a label of their own."""

Refresh = Callable[[], Awaitable[None]]


class Metrics:
    """The metrics of one server, or of one of its processes.

    They live on the reactor thread; counting costs some microseconds a request. Values that need a
    look-up are refreshed before a read: register a function with :meth:`before_reading`. With
    several processes one reads for all: it passes the others' :meth:`snapshot` to :meth:`absorb`.
    """

    def __init__(self) -> None:
        self._own = own = CollectorRegistry(auto_describe=False)
        self._refreshes: list[Refresh] = []
        self.requests = Counter(
            "obdelta_http_requests",
            "Requests answered.",
            ["endpoint", "route", "status"],
            registry=own,
        )
        self.request_seconds = Histogram(
            "obdelta_http_request_duration_seconds",
            "Seconds from the last byte of a request to the last byte of its response.",
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
            "Seconds of successful builds, without the wait in the queue.",
            ["kind"],
            buckets=_BUILD_SECONDS,
            registry=own,
        )
        self.stage_seconds = Histogram(
            "obdelta_build_stage_duration_seconds",
            "Seconds of the stages of successful builds, summed over the layers of a build.",
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
            "Seconds that builds waited in the queue.",
            buckets=_BUILD_SECONDS,
            registry=own,
        )
        self.running = Gauge("obdelta_builds_running", "Running builds.", registry=own)
        self.queued = Gauge("obdelta_builds_queued", "Queued builds.", registry=own)
        self.cache_requests = Counter(
            "obdelta_cache_requests",
            "Look-ups of builds in the caches.",
            ["cache", "result"],
            registry=own,
        )
        self.jobs_waiting = Gauge(
            "obdelta_jobs_waiting",
            "Jobs that wait for a worker, by queue.",
            ["queue"],
            registry=own,
        )
        self.worker_slots = Gauge(
            "obdelta_worker_slots", "Jobs that the live workers run at a time.", registry=own
        )
        self.job_wait = Histogram(
            "obdelta_job_wait_seconds",
            "Seconds that jobs of this worker waited in Redis, by queue.",
            ["queue"],
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 2, 5, 15, 60, 300, 900),
            registry=own,
        )
        self.workers = Gauge("obdelta_workers", "Live worker processes.", registry=own)
        self.worker_memory = Gauge(
            "obdelta_worker_resident_memory_bytes",
            "Resident memory of all worker processes.",
            registry=own,
        )
        self.worker_peak = Gauge(
            "obdelta_worker_peak_resident_memory_bytes",
            "Peak resident memory of one worker, read at the end of v3 builds.",
            registry=own,
        )
        self._peak = 0
        self.upstream_requests = Counter(
            "obdelta_upstream_requests", "Responses of the upstream.", ["status"], registry=own
        )
        self.upstream_errors = Counter(
            "obdelta_upstream_errors",
            "Requests to the upstream without a response.",
            ["reason"],
            registry=own,
        )
        self.store_bytes = Gauge(
            "obdelta_store_bytes", "Bytes of stored content.", ["kind"], registry=own
        )
        self.store_quota = Gauge(
            "obdelta_store_quota_bytes", "Maximum bytes of stored content.", ["kind"], registry=own
        )
        self.store_deltas = Gauge("obdelta_store_deltas", "Finished deltas.", registry=own)
        self.measured_devices = Gauge(
            "obdelta_measured_devices",
            "Devices whose link and processor were measured, in fleets with enough of them.",
            ["reads"],
            registry=own,
        )
        self.device_link = Gauge(
            "obdelta_device_link_bytes_per_second",
            "Link speed of measured devices: the median over fleets.",
            ["reads"],
            registry=own,
        )
        self.device_command = Gauge(
            "obdelta_device_command_seconds",
            "Seconds that a delta command takes on measured devices: the median over fleets.",
            ["reads"],
            registry=own,
        )
        self.fleet_polls = Counter(
            "obdelta_fleet_polls",
            "Requests for new releases to openBalena's API.",
            ["result"],
            registry=own,
        )
        self.prepared_deltas = Counter(
            "obdelta_fleet_prepared_deltas",
            "Deltas of new releases that were prepared before devices asked.",
            ["fleet", "state"],
            registry=own,
        )
        self._fleets: set[str] = set()
        self.log_messages = Counter(
            "obdelta_log_messages", "Messages logged.", ["level"], registry=own
        )
        for level in ("info", "warn", "error", "critical"):
            self.log_messages.labels(level)  # an alert on the first message needs the 0 before it
        self.ready = Gauge(
            "obdelta_ready",
            "Whether a check of /readyz finds no problem: 1 or 0.",
            ["check"],
            registry=own,
        )
        self.certificate_expiry = Gauge(
            "obdelta_certificate_not_after_timestamp_seconds",
            "When the certificate that is in use expires.",
            ["file"],
            registry=own,
        )
        self.build_info = Gauge(
            "obdelta_build_info",
            "Always 1; the versions are in the labels.",
            ["version", "python_version"],
            registry=own,
        )
        self.build_info.labels(__version__, platform.python_version()).set(1)
        self._counters = _CatalogueCounters()
        own.register(self._counters)
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

    def cache_looked_up(self, cache: str, hit: bool) -> None:
        """Records one look-up in a cache."""
        self.cache_requests.labels(cache, "hit" if hit else "miss").inc()

    def layers_matched(self, kept: int, made: int, peak: int) -> None:
        """Records the delta of a worker process: the match indexes of base layers that it found and
        made, and its peak memory in bytes.
        """
        self.cache_requests.labels("indexes", "hit").inc(kept)
        self.cache_requests.labels("indexes", "miss").inc(made)
        self._peak = max(self._peak, peak)
        self.worker_peak.set(self._peak)

    def devices_estimated(self, reads: str, fleets: Sequence[tuple[int, float, float]]) -> None:
        """Sets the measurements of devices whose engines read a form: for each fleet the number of
        devices, bits a second and microseconds a command. Without fleets there is no speed.
        """
        self.measured_devices.labels(reads).set(sum(devices for devices, _, _ in fleets))
        if fleets:
            self.device_link.labels(reads).set(median(link / 8 for _, link, _ in fleets))
            self.device_command.labels(reads).set(median(time / 1e6 for _, _, time in fleets))
        else:
            self.device_link.remove(reads)
            self.device_command.remove(reads)

    def fleet_prepared(self, fleet: str, state: str, count: int) -> None:
        """Records deltas of a new release by their state. Fleets above :data:`MAX_FLEETS` share one
        label.
        """
        if fleet not in self._fleets and len(self._fleets) >= MAX_FLEETS:
            fleet = "other fleets"
        self._fleets.add(fleet)
        self.prepared_deltas.labels(fleet, state).inc(count)

    def upstream_responded(self, status: int) -> None:
        """Records one answer of the upstream. Redirects and retries count separately."""
        self.upstream_requests.labels(str(status)).inc()

    def upstream_failed(self, reason: str) -> None:
        """Records one request without an answer. ``reason`` is one of a few words."""
        self.upstream_errors.labels(reason).inc()

    def checks_ended(self, problems: Mapping[str, str | None]) -> None:
        """Sets the result of each readiness check: its problem, or None."""
        for check, problem in problems.items():
            self.ready.labels(check).set(problem is None)

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Sets the catalogue's counters, ``area.name`` to count. They outlive the process."""
        self._counters.values = dict(counters)

    def before_reading(self, refresh: Refresh) -> None:
        """Registers a function that is awaited before :meth:`text`. It should refresh gauges."""
        self._refreshes.append(refresh)

    async def text(self, accept: str = "") -> tuple[str, bytes]:
        """Returns content type and body, in Prometheus' text format or OpenMetrics, as the header
        ``accept`` requests.
        """
        for refresh in self._refreshes:
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


class _CatalogueCounters(Collector):
    """The catalogue's counters as metric families."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        """Yields families for ``served.<kind>.<what>``. All other counters are events."""
        served = {
            "deltas": CounterMetricFamily(
                "obdelta_served_deltas", "Deltas served to devices.", labels=["kind"]
            ),
            "full_bytes": CounterMetricFamily(
                "obdelta_served_full_bytes",
                "Bytes of the full downloads that the served deltas replaced.",
                labels=["kind"],
            ),
            "delta_bytes": CounterMetricFamily(
                "obdelta_served_delta_bytes", "Bytes of the served deltas.", labels=["kind"]
            ),
        }
        events = CounterMetricFamily(
            "obdelta_events", "Events counted in the catalogue.", labels=["area", "event"]
        )
        for kind in ("v2", "v3"):
            for what, family in served.items():
                family.add_metric([kind], self.values.get(f"served.{kind}.{what}", 0))
        for name, value in sorted(self.values.items()):
            area, _, event = name.partition(".")
            if area != "served":
                events.add_metric([area, event], value)
        return [*served.values(), events]
