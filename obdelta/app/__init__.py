"""Puts the parts together: what the settings choose, started and stopped in order."""
