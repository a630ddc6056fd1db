"""Caches of what can be fetched or made again."""
