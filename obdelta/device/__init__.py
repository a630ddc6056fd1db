"""A client that acts as a device against any delta server, and verifies the result.

It blocks, and is for the command line, the demo and the tests. Nothing in the server imports it.
"""

from obdelta.device.http import Http
from obdelta.device.pull import Engine, Pulled
from obdelta.device.update import Base, Device, Update

__all__ = ["Base", "Device", "Engine", "Http", "Pulled", "Update"]
