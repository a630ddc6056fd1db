"""TLS to the upstream, its realm and its object storage, and a pooled agent with bounded time.

Certificate and host name are always checked; no setting turns this off.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from weakref import ref

from OpenSSL import SSL, crypto
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity
from service_identity.pyopenssl import extract_patterns
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import (
    Certificate,
    optionsForClientTLS,
    platformTrust,
    trustRootFromCertificates,
)
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.iweb import IAgent, IPolicyForHTTPS
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import SettingsError
from obdelta.registry.addresses import AddressRules, CheckedEndpoints
from obdelta.registry.http.bodies import bounded_pool

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def read_bundle(path: Path) -> list[Certificate]:
    """Returns the certificates of a PEM file. Raises SettingsError (``upstream-ca``) if it has none
    or cannot be read.
    """
    try:
        found = [Certificate.loadPEM(block) for block in _CERTIFICATE.findall(path.read_bytes())]
    except (OSError, crypto.Error, ValueError) as error:
        raise SettingsError(
            "upstream-ca", str(path), "a readable PEM file with certificates"
        ) from error
    if not found:
        raise SettingsError("upstream-ca", str(path), "a PEM file with at least one certificate")
    return found


@implementer(IPolicyForHTTPS)
class Trust:
    """Trusted authorities: if ``bundle`` is given, an authority in it must have signed the
    upstream's certificate.

    Its object storage and its realm may also be signed by an authority of this system: a registry
    with a private authority often keeps its blobs in a public cloud.
    """

    def __init__(self, upstream_host: str, bundle: list[Certificate] | None) -> None:
        self._host = upstream_host.lower()
        if bundle is None:
            self._upstream = self._others = platformTrust()
        else:
            system = ssl.create_default_context().get_ca_certs(binary_form=True)
            self._upstream = trustRootFromCertificates(bundle)
            self._others = trustRootFromCertificates(
                [*bundle, *(Certificate.load(der) for der in system)]
            )

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """Returns the TLS settings for one host."""
        name = hostname.decode("ascii")
        root = self._upstream if name.lower() == self._host else self._others
        return _StrictConnections(name, optionsForClientTLS(name, trustRoot=root))


@implementer(IOpenSSLClientConnectionCreator)
class _StrictConnections:
    """Twisted's own verification, but closed where Twisted (26.10) fails open.

    Twisted accepts a certificate whose names cannot be parsed (``*.lan``, ``*``): it logs the
    CertificateError and the connection continues. Here every error refuses the certificate.
    """

    def __init__(self, name: str, creator: IOpenSSLClientConnectionCreator) -> None:
        self._creator = creator
        self._wanted = (
            IPAddress_ID(name) if isIPAddress(name) or isIPv6Address(name) else DNS_ID(name)
        )

    def clientConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Returns a verifying connection."""
        connection: SSL.Connection = self._creator.clientConnectionForTLS(tlsProtocol)
        protocol = ref(tlsProtocol)

        def verify(
            _: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int
        ) -> bool:
            # Only the leaf has names that matter, and they count only in a valid chain.
            if not ok or depth:
                return bool(ok)
            try:
                verify_service_identity(extract_patterns(certificate), [self._wanted], [])
            except Exception:
                refused = protocol()
                if refused is not None:
                    refused.failVerification(Failure())
                return False
            return True

        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verify)
        return connection


def make_agent(
    reactor: IReactor,
    trust: IPolicyForHTTPS,
    *,
    connect: float = 15.0,
    rules: AddressRules | None = None,
) -> tuple[IAgent, HTTPConnectionPool]:
    """Returns an agent that stops connecting after ``connect`` seconds, and its pool: at most 16
    idle connections per host.

    ``rules``: which addresses it may connect to; None: any.
    """
    pool = bounded_pool(reactor)
    pool.maxPersistentPerHost = 16
    pool.cachedConnectionTimeout = 60
    if rules is not None:
        return Agent.usingEndpointFactory(
            reactor, CheckedEndpoints(reactor, trust, rules, connect), pool
        ), pool
    return Agent(reactor, contextFactory=trust, connectTimeout=connect, pool=pool), pool
