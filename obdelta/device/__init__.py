"""The client half: acts as a device against any delta server, and proves what it gets.

Blocking, for the command line, the demo and the tests; nothing in the server imports it.
"""

from obdelta.device.http import Http
from obdelta.device.pull import Engine, Pulled
from obdelta.device.update import Base, Device, Update

__all__ = ["Base", "Device", "Engine", "Http", "Pulled", "Update"]
