"""Logs, request IDs and metrics."""

from obdelta.observability.metrics import Metrics
from obdelta.observability.metrics_merge import Snapshot

__all__ = ["Metrics", "Snapshot"]
