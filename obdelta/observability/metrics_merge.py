"""Merges the metrics of several processes: every metric is summed, also gauges.

A process reports its counts since its start, so that a lost or doubled message changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Snapshot = list[list[Any]]
"""``[sample name, {label: value}, value]`` each, in JSON's types."""
_Series = tuple[str, tuple[tuple[str, str], ...]]
_Values = dict[_Series, float]
_SINGLE = frozenset({"obdelta_build_info"})
"""Metrics that describe, and count nothing, so they are not summed."""


class Merging(Collector):
    """Collects ``own`` plus the other processes' values. Series that only other processes have are
    included.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self._others: dict[str, _Values] = {}
        self._ended: _Values = defaultdict(float)

    def snapshot(self) -> Snapshot:
        """Returns the values of ``own`` alone."""
        return [
            [sample.name, dict(sample.labels), sample.value]
            for family in self._own.collect()
            if family.name not in _SINGLE
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    def value(self, name: str) -> float:
        """Returns the value of a series without labels, over all processes."""
        own_values = self._own.get_sample_value(name) or 0.0
        return own_values + sum(values.get((name, ()), 0.0) for values in self._others.values())

    def absorb(self, source: str, snapshot: Snapshot) -> None:
        """Replaces the earlier values of the same source."""
        values: _Values = {}
        try:
            for name, labels, value in snapshot:
                values[str(name), tuple(sorted((str(key), str(labels[key])) for key in labels))] = (
                    float(value)
                )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError("this is not a snapshot of metrics") from error
        self._others[source] = values

    def retire(self, source: str) -> None:
        """Keeps a source's counters and histograms, and drops its gauges."""
        gauges = {family.name for family in self._own.collect() if family.type == "gauge"}
        for series, value in self._others.pop(source, {}).items():
            if series[0] not in gauges:
                self._ended[series] += value

    def collect(self) -> Iterable[Metric]:
        """Yields the families of ``own`` in their order, without the creation times of their
        series.
        """
        for family in self._own.collect():
            merged = Metric(family.name, family.documentation, family.type)
            other_values = self._of_others(family)
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    series = (sample.name, tuple(sorted(sample.labels.items())))
                    merged.add_sample(
                        sample.name, sample.labels, sample.value + other_values.pop(series, 0.0)
                    )
            for (name, labels), value in sorted(other_values.items(), key=_by_bucket):
                merged.add_sample(name, dict(labels), value)
            yield merged

    def _of_others(self, family: Metric) -> _Values:
        names = {family.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")}
        found: _Values = defaultdict(float)
        for values in (self._ended, *self._others.values()):
            for series, value in values.items():
                if series[0] in names:
                    found[series] += value
        return found


def _by_bucket(item: tuple[_Series, float]) -> tuple[object, ...]:
    # Buckets of one series belong together, in the order of their bounds. Its sum and count come
    # after them.
    (name, labels), _ = item
    bounds = [float(value) for key, value in labels if key == "le"]
    rest = tuple(label for label in labels if label[0] != "le")
    return rest, not bounds, bounds, name
