"""Parts that the settings select: the upstream, credentials for it, access control,
certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from obdelta.concurrency.threads import Threads
from obdelta.errors import SettingsError
from obdelta.net import certificates
from obdelta.observability import Metrics
from obdelta.registry import (
    CredentialPolicy,
    Credentials,
    DeviceCredentials,
    OwnCredentials,
    Upstream,
)
from obdelta.registry.client import RegistryClient
from obdelta.registry.layouts.oci_layout import LayoutUpstream
from obdelta.settings import OciLayouts, Settings
from obdelta.web.devices.auth import Access, OpenAccess, token_access


def make_upstream(
    configured: Settings, reactor: Any, threads: Threads, metrics: Metrics | None = None
) -> Upstream:
    """Returns the upstream registry that the settings name."""
    if isinstance(configured.upstream, OciLayouts):
        return LayoutUpstream(configured.upstream.path, threads)
    realms = set(configured.token_realms or ())
    if configured.auth_realm is not None and (realm := urlsplit(configured.auth_realm).hostname):
        realms.add(realm)
    return RegistryClient.connect(
        reactor,
        configured.upstream.url,
        threads,
        ca=configured.upstream_ca,
        metrics=metrics,
        realms=realms,
        basic=configured.upstream_basic,
        redirects=configured.upstream_redirects or (),
    )


def make_policy(configured: Settings) -> CredentialPolicy:
    """Returns the rule for which credentials go to the upstream."""
    if configured.upstream_credentials == "device":
        return DeviceCredentials()
    if configured.upstream_credentials == "builder":
        if configured.builder_token is None:
            raise SettingsError("builder-token", None, "the builder's token")
        return OwnCredentials.builder(configured.builder_token)
    return OwnCredentials.none()


def own_credentials(configured: Settings) -> Credentials | None:
    """Returns the server's own credentials at the upstream, None where it has none."""
    if configured.builder_token is not None and configured.upstream_credentials != "none":
        return OwnCredentials.builder(configured.builder_token).own
    return OwnCredentials.none().own if configured.upstream_credentials == "none" else None


def make_access(configured: Settings, now: Callable[[], float]) -> Access:
    """Returns the access control. Raises SettingsError where it needs a key and has none."""
    if configured.auth == "none":
        return OpenAccess()
    return token_access(
        key=configured.auth_key,
        algorithms=configured.jwt_algorithm,
        issuer=configured.auth_issuer,
        audiences=configured.auth_audience,
        realm=configured.auth_realm,
        service=configured.auth_service,
        now=now,
    )


def make_certificates(
    configured: Settings, now: Callable[[], float]
) -> certificates.Certificates | None:
    """Returns the certificates of ``listen``, None where it serves plain HTTP."""
    pairs = certificates.pairs(configured.tls_certificate, configured.tls_key)
    return certificates.Certificates(pairs, now) if pairs else None
