"""Registers ``obdelta`` with ``twistd``. The implementation is in :mod:`obdelta.tap`."""

from twisted.application.service import ServiceMaker

obdelta = ServiceMaker(
    "obdelta",
    "obdelta.tap",
    "Delta updates for openBalena devices: a streaming proxy before the registry.",
    "obdelta",
)
