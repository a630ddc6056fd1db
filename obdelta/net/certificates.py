"""TLS certificates of the server: several, selected by SNI, reloaded when their files change.

A connection keeps the certificate that it began with, so a renewal does not break a download.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator, IProtocol
from twisted.logger import Logger
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from obdelta.concurrency.watched_file import FileProblem, WatchedFiles
from obdelta.errors import SettingsError

CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"
"""Cipher suites of TLS 1.2: forward secrecy and authenticated encryption only. TLS 1.3 has no
others.
"""

SOON = 14 * 86400
"""Seconds before the expiry of a certificate from which on there is a warning."""
_MAX_FILE = 1 << 20
_PARTIAL_WRITE = 1
"""SSL_MODE_ENABLE_PARTIAL_WRITE of OpenSSL's ssl.h, which pyOpenSSL sets and does not name."""
_SMALL = 1 << 14
"""Bytes below which a write is joined with others: less than a TLS record."""
_MAX_READ = 1 << 17
"""Maximum number of bytes that one call reads from OpenSSL."""


class CertificateUnusable(Exception):
    """A certificate or key file cannot be used. ``setting`` and ``path`` name it; ``str()`` says
    why.
    """

    def __init__(self, setting: str, path: Path, why: str) -> None:
        self.setting, self.path = setting, path
        super().__init__(why)


class Pair:
    """A certificate chain (leaf first) and its private key, as last read. ``key`` may be the same
    file.
    """

    def __init__(self, certificate: Path, key: Path, now: Callable[[], float]) -> None:
        """Reads both files. Raises CertificateUnusable."""
        self.certificate, self._key = certificate, key
        self._watched = WatchedFiles([certificate, key], now)
        self._load()

    context: SSL.Context
    names: frozenset[str]
    expires: datetime

    def __str__(self) -> str:
        until = f"{self.expires:%Y-%m-%d %H:%M} UTC"
        return f"{self.certificate} ({' '.join(sorted(self.names))}, until {until})"

    def reload_if_changed(self) -> bool:
        """Reads changed files again, and returns whether they had changed. Raises
        CertificateUnusable, once for each change; the earlier content then stays in force.
        """
        changed = self._watched.changed()
        if changed:
            self._load()
        return changed

    def reload(self) -> None:
        """Reads both files again. Raises CertificateUnusable; the earlier content stays in force
        then.
        """
        self._watched.mark()
        self._load()

    def covers(self, name: str) -> int:
        """Returns how well the certificate fits a lower-case host name: 2 by name, 1 by a wildcard
        for the first label, 0 not.
        """
        if name in self.names:
            return 2
        return 1 if "*." + name.partition(".")[2] in self.names else 0

    def _load(self) -> None:
        chain, key = _read_chain(self.certificate), _read_key(self._key)
        if key.public_key() != chain[0].public_key():
            raise CertificateUnusable(
                "tls-key", self._key, f"it is not the key of {self.certificate}"
            )
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_cipher_list(CIPHERS)
        context.set_options(
            SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE
        )
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        # Writes go to memory, which always takes all of them.
        context.clear_mode(_PARTIAL_WRITE)
        context.set_alpn_select_callback(_select_protocol)
        try:
            context.use_certificate(chain[0])
            for certificate in chain[1:]:
                context.add_extra_chain_cert(certificate)
            private: Any = key
            context.use_privatekey(private)
        except (SSL.Error, TypeError, ValueError) as error:
            raise CertificateUnusable(
                "tls-certificate", self.certificate, "its kind is not accepted for TLS"
            ) from error
        self.context, self.names = context, _names(chain[0])
        self.expires = chain[0].not_valid_after_utc


def _select_protocol(_connection: SSL.Connection, offered: list[bytes]) -> Any:
    return b"http/1.1" if b"http/1.1" in offered else SSL.NO_OVERLAPPING_PROTOCOLS


@implementer(IOpenSSLServerConnectionCreator)
class Certificates:
    """All certificates. The first one answers clients that send no host name, or an uncovered one.

    The files are checked when a connection opens, at most once a second (``now`` is in seconds). A
    pair that is unusable after a change (half written, a wrong key) is logged, and the old one
    stays in force.
    """

    _log = Logger()

    def __init__(self, pairs: Sequence[tuple[Path, Path]], now: Callable[[], float]) -> None:
        """``pairs`` are certificate and key files. Raises SettingsError that names the file."""
        try:
            self._pairs = [Pair(certificate, key, now) for certificate, key in pairs]
            self._now, self._problems = now, dict[Pair, FileProblem]()
        except CertificateUnusable as error:
            raise SettingsError(
                error.setting, str(error.path), f"a PEM file for TLS: {error}"
            ) from error
        for pair in self._pairs:
            self._use(pair)

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        """See IOpenSSLServerConnectionCreator."""
        self._read(always=False)
        return SSL.Connection(self._pairs[0].context, None)

    def _use(self, pair: Pair) -> None:
        pair.context.set_tlsext_servername_callback(self._choose)
        self._log.info("certificate in use: {pair}", pair=str(pair))

    def covers(self, name: str) -> bool:
        """Returns whether a certificate fits a host name."""
        return any(pair.covers(name.lower()) for pair in self._pairs)

    def expiries(self) -> dict[str, float]:
        """Returns the file of each certificate in use, and the time when it expires, in seconds
        since 1970.
        """
        return {str(pair.certificate): pair.expires.timestamp() for pair in self._pairs}

    def problems(self) -> list[FileProblem]:
        """Reads files that have changed, as a new connection does. Returns those of them that are
        unusable, while the old certificate stays in force.
        """
        self._read(always=False)
        return list(self._problems.values())

    def reload(self) -> list[str]:
        """Reads all files again, changed or not, and logs which certificates are in use. Returns a
        line for each that is unusable.
        """
        return self._read(always=True)

    def _read(self, *, always: bool) -> list[str]:
        problems = []
        for pair in self._pairs:
            try:
                if always:
                    pair.reload()
                elif not pair.reload_if_changed():
                    continue
            except CertificateUnusable as error:
                self._log.error(
                    "{path} cannot be used: {why}: the old certificate stays in force",
                    path=str(error.path),
                    why=str(error),
                )
                problems.append(f"{error.path}: {error}: the old certificate stays in force")
                self._problems[pair] = FileProblem(error.path, str(error), self._now())
            else:
                self._problems.pop(pair, None)
                self._use(pair)
        return problems

    def _choose(self, connection: SSL.Connection) -> None:
        name = connection.get_servername()
        if name is None:
            return
        wanted = name.decode("latin-1").lower().rstrip(".")
        best = max(self._pairs, key=lambda pair: pair.covers(wanted))
        if best.covers(wanted):
            connection.set_context(best.context)


class WholePieces(BufferingTLSTransport):
    """Twisted's TLS with one OpenSSL call, one read and one socket write for each write of the
    application.

    Twisted makes three calls for each record of 16 KiB, a third of the cost of serving a file. Only
    for contexts that do not write in part.
    """

    _tlsConnection: SSL.Connection
    transport: Any

    def __init__(
        self, factory: TLSMemoryBIOFactory, wrapped: IProtocol, connect: bool = True
    ) -> None:
        super().__init__(factory, wrapped, connect)
        # On the instance, as Twisted does it.
        self.write = self._write_soon  # type: ignore[method-assign]

    def _write_soon(self, octets: bytes) -> None:
        """Joins small writes, and writes large ones at once. Twisted would buffer 64 kB of each
        connection before the socket can pause the producer.
        """
        if len(octets) < _SMALL:
            self._aggregator.write(octets)
        else:
            self._aggregator.flush()
            TLSMemoryBIOProtocol.write(self, octets)

    def _write(self, octets: bytes) -> None:
        if self._lostTLSConnection or not octets:
            return
        try:
            self._tlsConnection.send(octets)
        except SSL.WantReadError:
            self._bufferedWrite(octets)  # type: ignore[no-untyped-call] # Twisted's
        except SSL.Error:
            self._tlsShutdownFinished(Failure())  # type: ignore[no-untyped-call] # Twisted's
            return
        self._flushSendBIO()

    def _flushSendBIO(self) -> None:
        """Sends all pending records."""
        while True:
            try:
                records = self._tlsConnection.bio_read(_MAX_READ)
            except SSL.WantReadError:
                return
            self.transport.write(records)
            if len(records) < _MAX_READ:
                return


def pairs(
    certificates: Sequence[Path] | None, keys: Sequence[Path] | None
) -> list[tuple[Path, Path]]:
    """Returns the settings ``tls-certificate`` and ``tls-key`` as pairs. Without keys, each key is
    in its certificate's file.

    Raises SettingsError if their numbers differ.
    """
    certificates = certificates or ()
    if keys is not None and len(keys) != len(certificates):
        raise SettingsError(
            "tls-key",
            " ".join(map(str, keys)),
            f"as many as in tls-certificate, {len(certificates)}",
        )
    return list(zip(certificates, certificates if keys is None else keys, strict=True))


def _read(setting: str, path: Path) -> bytes:
    try:
        with path.open("rb") as source:
            content = source.read(_MAX_FILE + 1)
    except OSError as error:
        raise CertificateUnusable(setting, path, error.strerror or "it cannot be read") from error
    if len(content) > _MAX_FILE:
        raise CertificateUnusable(setting, path, f"it is larger than {_MAX_FILE} bytes")
    return content


def _read_chain(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read("tls-certificate", path))
    except ValueError as error:
        raise CertificateUnusable(
            "tls-certificate", path, "it holds no PEM certificate, or one that is broken"
        ) from error


def _read_key(path: Path) -> PrivateKeyTypes:
    content = _read("tls-key", path)
    try:
        return load_pem_private_key(content, None)
    except TypeError as error:
        raise CertificateUnusable(
            "tls-key", path, "the private key has a passphrase; give one without"
        ) from error
    except Exception as error:  # cryptography raises several families for what cannot be parsed
        raise CertificateUnusable(
            "tls-key", path, "it holds no PEM private key, or one that is broken"
        ) from error


def _names(certificate: x509.Certificate) -> frozenset[str]:
    """Returns the lower-case DNS names of a certificate, or its common name if it has none."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = [
            str(name.value)
            for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        ]
    return frozenset(name.lower() for name in names)
