"""Threads, limits and shared calls: used by every other package."""
