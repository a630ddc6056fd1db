"""The upstream registry: clients for it, and the interface that they share."""

from obdelta.registry.auth.credentials import (
    CredentialPolicy,
    Credentials,
    DeviceCredentials,
    OwnCredentials,
)
from obdelta.registry.client import RegistryClient
from obdelta.registry.http.transport_errors import WrongContent
from obdelta.registry.layouts.oci_layout import LayoutUpstream
from obdelta.registry.upstream import ProxiedRequest, ProxiedResponse, Sink, Upstream

__all__ = [
    "CredentialPolicy",
    "Credentials",
    "DeviceCredentials",
    "LayoutUpstream",
    "OwnCredentials",
    "ProxiedRequest",
    "ProxiedResponse",
    "RegistryClient",
    "Sink",
    "Upstream",
    "WrongContent",
]
