"""Builds on other machines: frontends enqueue jobs in Redis, and ``obdelta worker`` runs them."""
