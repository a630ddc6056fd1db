"""Reports of what made a delta large."""
