"""Wires the packages that the settings select, and starts and stops them in order."""
