"""v2 deltas: records rsync batches and proves them, without root."""
