"""Caches of content that can be fetched or built again."""
