"""The catalogue: an SQLite database of deltas, manifests, failures and counters."""
