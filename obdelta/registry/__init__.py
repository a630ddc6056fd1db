"""The upstream: where images come from."""

from obdelta.registry.client import RegistryClient
from obdelta.registry.credentials import CredentialPolicy, Credentials, DeviceCredentials, OwnCredentials
from obdelta.registry.http import WrongContent
from obdelta.registry.layout import LayoutUpstream
from obdelta.registry.upstream import RelayRequest, RelayResponse, Sink, Upstream

__all__ = [
    "CredentialPolicy",
    "Credentials",
    "DeviceCredentials",
    "LayoutUpstream",
    "OwnCredentials",
    "RegistryClient",
    "RelayRequest",
    "RelayResponse",
    "Sink",
    "Upstream",
    "WrongContent",
]
