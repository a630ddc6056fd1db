"""Deltas that a balena-engine builds."""
