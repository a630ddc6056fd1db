"""Publishing of finished deltas: in the store, and in the registry."""
