"""The upstream: where images come from."""

from obdelta.registry.credentials import CredentialPolicy, Credentials, DeviceCredentials, OwnCredentials
from obdelta.registry.upstream import RelayRequest, RelayResponse, Sink, Upstream

__all__ = [
    "CredentialPolicy",
    "Credentials",
    "DeviceCredentials",
    "OwnCredentials",
    "RelayRequest",
    "RelayResponse",
    "Sink",
    "Upstream",
]
