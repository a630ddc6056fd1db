"""Threads, limits and shared calls that every other package uses."""
