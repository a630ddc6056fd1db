"""The ``obdelta`` command."""

from obdelta.cli.main import main

__all__ = ["main"]
