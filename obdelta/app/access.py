"""Access of devices, and credentials for the upstream registry."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from obdelta.app.runtime import Runtime
from obdelta.errors import SettingsError, joined
from obdelta.net import certificates
from obdelta.net.client_address import ForwardedClients, TrustedProxies
from obdelta.registry import (
    CredentialPolicy,
    Credentials,
    DeviceCredentials,
    OwnCredentials,
    Upstream,
)
from obdelta.registry.client import RegistryClient
from obdelta.registry.layouts.oci_layout import LayoutUpstream
from obdelta.settings import OciLayouts, Settings, table
from obdelta.web.devices.access.admission import Access, OpenAccess, TokenAccess
from obdelta.web.devices.access.token_keys import load_keys
from obdelta.web.devices.access.token_verifier import Verifier


def make_upstream(runtime: Runtime) -> Upstream:
    """Returns the upstream registry that the settings name. The caller closes it."""
    configured = runtime.settings
    if isinstance(configured.upstream, OciLayouts):
        return LayoutUpstream(configured.upstream.path, runtime.threads)
    realms = set(configured.token_realms or ())
    if configured.auth_realm is not None and (realm := urlsplit(configured.auth_realm).hostname):
        realms.add(realm)
    return RegistryClient.connect(
        runtime.reactor,
        configured.upstream.url,
        runtime.threads,
        ca=configured.upstream_ca,
        metrics=runtime.metrics,
        realms=realms,
        basic=configured.upstream_basic,
        redirects=configured.upstream_redirects or (),
    )


def make_policy(configured: Settings) -> CredentialPolicy:
    """Returns the rule for which credentials go to the upstream."""
    if configured.upstream_credentials == "device":
        return DeviceCredentials()
    if configured.upstream_credentials in ("builder", "basic"):
        if configured.builder_token is None:
            raise SettingsError("builder-token", None, "the builder's token")
        return OwnCredentials.builder(configured.builder_token)
    return OwnCredentials.none()


def own_credentials(configured: Settings) -> Credentials | None:
    """Returns the server's own credentials at the upstream, None if it has none."""
    if configured.builder_token is not None and configured.upstream_credentials != "none":
        return OwnCredentials.builder(configured.builder_token).own
    return OwnCredentials.none().own if configured.upstream_credentials == "none" else None


def push_target(configured: Settings) -> tuple[str, Credentials] | None:
    """Returns the host of the registry to which deltas are pushed, and credentials that may push
    there. None if only obdelta serves deltas. Raises SettingsError.
    """
    if configured.publish == "serve" and configured.shared is None:
        return None
    host = registry_host(configured, "publish" if configured.shared is None else "shared")
    return host, push_credentials(configured)


def push_credentials(configured: Settings) -> Credentials:
    """Returns credentials that may push to every repository: the builder's token, or none for an
    open registry. Raises SettingsError.
    """
    if configured.builder_token is not None:
        return OwnCredentials.builder(configured.builder_token).own
    if configured.upstream_credentials == "none":
        return OwnCredentials.none().own
    raise SettingsError(
        "builder-token",
        None,
        "the builder's token, with which deltas are pushed (publish = registry, or shared)",
    )


_WITHOUT_REGISTRY: Final = {"builder": "native", "publish": "serve", "shared": "no value"}


def registry_host(configured: Settings, key: str) -> str:
    """Returns the host that others use for the upstream registry, which the setting ``key`` needs.
    Raises SettingsError if the upstream is no registry.
    """
    host = configured.publish_host
    if host is None or isinstance(configured.upstream, OciLayouts):
        raise SettingsError(
            key,
            configured.texts[key],
            f"{_WITHOUT_REGISTRY[key]}, where the upstream is oci:DIR: it needs a registry",
        )
    return host


def preparing_credentials(configured: Settings) -> Callable[[bytes | None], Credentials]:
    """Returns a function that chooses the upstream credentials for deltas that operators prepare.

    Those of the operator's request come first, then the server's own. The server's own may be the
    builder's token, even if devices send their own credentials.
    """
    own = own_credentials(configured) or make_policy(configured).credentials(None)
    return lambda header: own if header is None else Credentials.from_header(header)


@dataclass(frozen=True, slots=True)
class Ingress:
    """How requests of devices come in: over TLS or not, from which client, and with which access.

    With the PROXY protocol a connection belongs to one device; without it, a proxy's connection
    carries requests of many. ``forwarding`` are the proxies whose headers name the client.
    """

    access: Access
    certificates: certificates.Certificates | None
    proxies: TrustedProxies
    forwarding: TrustedProxies | None
    forwarded: ForwardedClients


def make_ingress(runtime: Runtime) -> Ingress:
    """Returns how requests of devices come in, by the settings. Raises SettingsError, also if
    access control needs a key and has none.
    """
    configured = runtime.settings
    proxies = TrustedProxies(configured.proxy_from.networks)
    forwarding = None if configured.proxy_protocol else proxies
    return Ingress(
        make_access(configured, clock=runtime.reactor.seconds),
        make_certificates(configured, runtime.reactor.seconds),
        proxies,
        forwarding,
        ForwardedClients(forwarding),
    )


def make_certificates(
    configured: Settings, now: Callable[[], float]
) -> certificates.Certificates | None:
    """Returns the certificates of ``listen``, None if it serves plain HTTP."""
    pairs = certificates.pairs(configured.tls_certificate, configured.tls_key)
    return certificates.Certificates(pairs, now) if pairs else None


def make_access(
    configured: Settings,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
) -> Access:
    """Returns the access control. ``now`` (seconds UTC) is the time of tokens, ``clock`` that of
    looks at the key's file. Raises SettingsError, with a remedy, where ``auth = token`` lacks a
    setting or cannot use one.
    """
    if configured.auth == "none":
        return OpenAccess()
    key, issuer, realm = configured.auth_key, configured.auth_issuer, configured.auth_realm
    audiences, service = configured.auth_audience, configured.auth_service
    errors = []
    if key is None:
        errors.append(
            SettingsError(
                "auth-key",
                None,
                "the API's public key: a file (openBalena's /certs/private/api.<domain>.pem, which"
                " BALENA_TLD selects), or TOKEN_AUTH_CERT_PUB; auth = none lets every client pull"
                " everything",
            )
        )
    expected = {row.key: row.expected for row in table()}
    for name, value in (("issuer", issuer), ("audience", audiences), ("realm", realm)):
        if not value:
            errors.append(
                SettingsError(
                    f"auth-{name}",
                    None,
                    f"{expected[f'auth-{name}']}, or BALENA_TLD in the environment, from which it"
                    " follows",
                )
            )
    if errors:
        raise joined(errors)
    assert key and issuer and audiences and realm and service  # noqa: S101 - for the type checker
    keys = load_keys(key, configured.jwt_algorithm, clock)
    verifier = Verifier(keys, issuer=issuer, audiences=audiences, now=now)
    return TokenAccess(verifier, realm=realm, service=service)
