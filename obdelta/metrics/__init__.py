"""What is counted and measured, for Prometheus. Everything is in one :class:`Metrics`, which is handed in where it is needed."""

from obdelta.metrics.merging import Snapshot
from obdelta.metrics.metrics import Metrics

__all__ = ["Metrics", "Snapshot"]
