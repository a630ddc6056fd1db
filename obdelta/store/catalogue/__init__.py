"""The catalogue: what is known, in SQLite."""
