"""v2 deltas: rsync batches, made and proven without root."""
