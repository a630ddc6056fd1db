"""The package fleet."""
