"""TLS to the upstream, its realm and its object storage, and a pooled agent with bounded time.

Certificate and host name are always checked; no setting turns this off.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from weakref import ref

from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.hazmat import (
    DNS_ID,
    CertificatePattern,
    DNSPattern,
    IPAddress_ID,
    IPAddressPattern,
    verify_service_identity,
)
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

_CODES = SSL.X509VerificationCodes
_AUTHORITY = "name its authority in upstream-ca if you trust it"
_REASONS = {
    _CODES.ERR_CERT_HAS_EXPIRED: "certificate has expired: renew it, or set this machine's clock",
    _CODES.ERR_CERT_NOT_YET_VALID: "certificate is not yet valid: set this machine's clock",
    _CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT: f"self-signed certificate: {_AUTHORITY}",
    _CODES.ERR_SELF_SIGNED_CERT_IN_CHAIN: (
        f"self-signed certificate in certificate chain: {_AUTHORITY}"
    ),
    _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: (
        f"unable to get local issuer certificate: {_AUTHORITY}"
    ),
    _CODES.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: (
        f"unable to verify the first certificate: {_AUTHORITY}"
    ),
    _CODES.ERR_CERT_REVOKED: "certificate revoked: get a new one",
    _CODES.ERR_INVALID_PURPOSE: "unsuitable certificate purpose: it is not for a TLS server",
    _CODES.ERR_CERT_SIGNATURE_FAILURE: "certificate signature failure: it was changed, or its"
    " authority has another key",
}
"""OpenSSL's texts (X509_verify_cert_error_string(3)) for the usual codes, with a remedy."""
_MAX_NAMES = 3
_NAME = re.compile(r"[A-Za-z0-9*._:-]{1,253}", re.ASCII)


class CertificateRefused(Exception):
    """The chain of an upstream's certificate is not valid. ``str()`` has OpenSSL's reason and a
    remedy. ``depth``: 0 for its own certificate, more for one of an authority.
    """

    def __init__(self, code: int, depth: int) -> None:
        dated = code in (_CODES.ERR_CERT_HAS_EXPIRED, _CODES.ERR_CERT_NOT_YET_VALID)
        of_authority = " (that of an authority)" if depth and dated else ""
        reason = _REASONS.get(code, f"error {code} of OpenSSL's verification")
        head, colon, remedy = reason.partition(":")
        super().__init__(f"{head}{of_authority}{colon}{remedy}")


class OtherName(Exception):
    """An upstream's certificate is valid, but for other names. ``str()`` lists them."""

    def __init__(self, patterns: Sequence[CertificatePattern]) -> None:
        names = [
            pattern.pattern.decode("latin-1")
            if isinstance(pattern, DNSPattern)
            else str(pattern.pattern)
            for pattern in patterns
            if isinstance(pattern, DNSPattern | IPAddressPattern)
        ]
        found = [name for name in names if _NAME.fullmatch(name)]
        more = " …" if len(names) > _MAX_NAMES else ""
        super().__init__(" ".join(found[:_MAX_NAMES]) + more)


TLS_ERRORS = (CertificateError, CertificateRefused, OtherName, SSL.Error, VerificationError)
"""The errors for which :func:`tls_failure` has a reason."""


def tls_failure(error: BaseException, host: str) -> str | None:
    """Returns why there is no TLS connection to a host, None for another kind of error."""
    match error:
        case CertificateRefused():
            return f"no TLS connection to {host}: certificate verify failed: {error}"
        case OtherName():
            return (
                f"the TLS certificate of {host} is for another name: it has {error}: use one of its"
                " names"
            )
        case VerificationError():
            return f"the TLS certificate of {host} is for another name"
        case CertificateError():
            return f"the TLS certificate of {host} has names that cannot be checked"
        case SSL.Error():
            # OpenSSL's own text, such as "wrong version number".
            queue = error.args[0] if error.args else None
            words = [str(entry[-1]) for entry in queue if entry] if isinstance(queue, list) else []
            return f"no TLS connection to {host}: {'; '.join(words) or 'the handshake failed'}"
    return None


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
            if ok and depth:
                return True
            try:
                if not ok:
                    raise CertificateRefused(error, depth)
                patterns = extract_patterns(certificate)
                try:
                    verify_service_identity(patterns, [self._wanted], [])
                except VerificationError as mismatch:
                    raise OtherName(patterns) from mismatch
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
