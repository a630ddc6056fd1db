"""Certificates: selected by name, read again after a change, refused with the file's name.
Handshakes are in memory.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from OpenSSL import SSL

from obdelta.errors import SettingsError
from obdelta.net.certificates import Certificates, pairs
from tests.support.logs import logged
from tests.support.tokens import make_certificate, make_key, private_pem


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Server:
    """Pairs of certificate and key files in a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.pairs: list[tuple[Path, Path]] = []

    def add(self, name: str, *names: str, algorithm: str = "ES256") -> bytes:
        """Writes (again) the pair ``name``; returns its leaf certificate in DER."""
        key = make_key(algorithm)
        certificate = make_certificate(key, *(names or (name,)))
        (self.folder / f"{name}.pem").write_bytes(certificate)
        (self.folder / f"{name}.key").write_bytes(private_pem(key))
        pair = (self.folder / f"{name}.pem", self.folder / f"{name}.key")
        if pair not in self.pairs:
            self.pairs.append(pair)
        return x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)

    def certificates(self) -> Certificates:
        return Certificates(self.pairs, self.clock)


class Client:
    """An OpenSSL client and a server connection, joined in memory."""

    def __init__(
        self,
        certificates: Certificates,
        name: str | None,
        adjust: Callable[[ssl.SSLContext], Any] | None = None,
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2", "http/1.1"])
        if adjust is not None:
            adjust(context)
        self._to_client, self._to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._to_client, self._to_server, server_hostname=name)
        self.server = certificates.serverConnectionForTLS(None)
        self.server.set_accept_state()
        self.done(self.tls.do_handshake)
        self.done(lambda: self.server_step(self.server.do_handshake))

    def server_step(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except SSL.WantReadError:
            raise ssl.SSLWantReadError from None

    def done(self, action: Callable[[], Any]) -> Any:
        """Repeats an action until it succeeds, and carries bytes both ways in between."""
        for _ in range(20):
            try:
                result = action()
            except ssl.SSLWantReadError:
                result = None
                waits = True
            else:
                waits = False
            self._carry()
            if not waits:
                return result
        raise AssertionError("the handshake does not end")

    def _carry(self) -> None:
        if pending := self._to_server.read():
            self.server.bio_write(pending)
        for step in (
            self.server.do_handshake,
            lambda: self._to_client.write(self.server.bio_read(1 << 16)),
        ):
            try:
                step()
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                raise ssl.SSLError(str(error)) from error

    @property
    def certificate(self) -> bytes | None:
        return self.tls.getpeercert(binary_form=True)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_sni_selects_the_certificate(server: Server) -> None:
    first = server.add("first.example.com")
    named = server.add("delta.example.com", "delta.example.com", "delta2.example.com")
    wild = server.add("wild", "*.example.com", "*.EXAMPLE.org")
    certificates = server.certificates()
    expected = {
        "first.example.com": first,
        "delta.example.com": named,
        "DELTA.Example.Com": named,
        "delta2.example.com": named,
        "other.example.com": wild,
        "x.example.org": wild,
        "a.b.example.com": first,  # a wildcard covers one label
        "example.com": first,
        "example.net": first,
        None: first,
    }
    assert {name: Client(certificates, name).certificate for name in expected} == expected


def test_alpn_offers_only_http_1(server: Server) -> None:
    server.add("a.example.com")
    server.add("b.example.com")
    certificates = server.certificates()
    for name in ("a.example.com", "b.example.com"):
        assert Client(certificates, name).tls.selected_alpn_protocol() == "http/1.1"
    only_h2 = Client(
        certificates, "b.example.com", lambda context: context.set_alpn_protocols(["h2"])
    )
    assert only_h2.tls.selected_alpn_protocol() is None


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_tls_1_2_and_1_3_with_forward_secrecy(algorithm: str, server: Server) -> None:
    server.add("a.example.com", algorithm=algorithm)
    certificates = server.certificates()
    for version, shown in (
        (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
        (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
    ):

        def only(context: ssl.SSLContext, version: ssl.TLSVersion = version) -> None:
            context.maximum_version = version

        client = Client(certificates, "a.example.com", only)
        assert client.tls.version() == shown
        cipher = client.tls.cipher()
        assert cipher is not None and ("GCM" in cipher[0] or "CHACHA20" in cipher[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_versions_and_weak_suites_are_refused(server: Server) -> None:
    server.add("a.example.com", algorithm="RS256")
    certificates = server.certificates()

    def older(context: ssl.SSLContext) -> None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1

    def weak(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA:AES256-GCM-SHA384:ECDHE-RSA-AES128-SHA")

    for adjust, why in ((older, "unsupported protocol"), (weak, "no shared cipher")):
        with pytest.raises(ssl.SSLError, match=why):  # as the server says it
            Client(certificates, "a.example.com", adjust)


def test_the_whole_chain_is_sent(server: Server) -> None:
    ca_key, key = make_key("ES256"), make_key("ES256")
    ca = make_certificate(ca_key, "ca.example.com")
    leaf = make_certificate(
        key, "a.example.com", signer=(x509.load_pem_x509_certificate(ca), ca_key)
    )
    # One file for all, in the order that certbot and openBalena's cert-manager write
    chain = server.folder / "chain.pem"
    chain.write_bytes(leaf + ca + private_pem(key))
    server.pairs = pairs([chain], None)

    def verify(context: ssl.SSLContext) -> None:
        context.load_verify_locations(cadata=ca.decode())
        context.verify_mode, context.check_hostname = ssl.CERT_REQUIRED, True

    assert Client(server.certificates(), "a.example.com", verify).tls.version() == "TLSv1.3"


def test_a_renewed_certificate_is_for_new_connections_only(server: Server) -> None:
    old = server.add("a.example.com")
    certificates = server.certificates()
    before = Client(certificates, "a.example.com")
    new = server.add("a.example.com")
    server.clock.seconds += 0.5
    assert Client(certificates, "a.example.com").certificate == old, (
        "looked at once a second at most"
    )
    server.clock.seconds += 0.5
    with logged("info") as lines:
        after = Client(certificates, "a.example.com")
    assert (before.certificate, after.certificate) == (old, new)
    assert len(lines) == 1 and "a.example.com" in lines[0]
    leaf = x509.load_der_x509_certificate(new)
    file, _ = server.pairs[0]
    assert certificates.expiries() == {str(file): leaf.not_valid_after_utc.timestamp()}
    # The first connection continues with its own keys.
    before.server.send(b"still here")
    before._carry()
    assert before.done(lambda: before.tls.read(100)) == b"still here"


def test_names_change_with_the_certificate(server: Server) -> None:
    first = server.add("first.example.com")
    server.add("second.example.com")
    certificates = server.certificates()
    second = server.add("second.example.com", "renamed.example.com")
    server.clock.seconds += 1
    assert Client(certificates, "renamed.example.com").certificate == second
    assert Client(certificates, "second.example.com").certificate == first


def broken_key(server: Server) -> None:
    (server.folder / "a.example.com.key").write_bytes(private_pem(make_key("ES256")))


def half_written(server: Server) -> None:
    path = server.folder / "a.example.com.pem"
    path.write_bytes(path.read_bytes()[:200])


def gone(server: Server) -> None:
    (server.folder / "a.example.com.key").unlink()


@pytest.mark.parametrize("spoil", [broken_key, half_written, gone])
def test_an_unusable_new_certificate_keeps_the_old_one(
    spoil: Callable[[Server], None], server: Server
) -> None:
    old = server.add("a.example.com")
    certificates = server.certificates()
    spoil(server)
    with logged("error") as lines:
        for _ in range(4):
            server.clock.seconds += 1
            assert Client(certificates, "a.example.com").certificate == old
    assert len(lines) == 1 and "a.example.com" in lines[0] and "old certificate" in lines[0]
    (problem,) = certificates.problems()
    assert problem.path in server.pairs[0] and problem.why in lines[0] and problem.since == 1
    new = server.add("a.example.com")
    server.clock.seconds += 1
    assert Client(certificates, "a.example.com").certificate == new
    assert certificates.problems() == []


def test_unusable_files_are_found_without_a_connection(server: Server) -> None:
    server.add("a.example.com")
    certificates = server.certificates()
    broken_key(server)
    assert certificates.problems() == [], "looked at once a second at most"
    server.clock.seconds += 1
    assert len(certificates.problems()) == 1
    server.add("a.example.com")
    server.clock.seconds += 1
    assert certificates.problems() == []


def test_an_unusable_certificate_stops_the_start_and_is_named(server: Server) -> None:
    server.add("a.example.com")
    (certificate, key) = server.pairs[0]
    encrypted = make_key("ES256").private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    of_dsa = dsa.generate_private_key(1024).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    good = key.read_bytes()
    for content, why in (
        (private_pem(make_key("ES256")), "not the key of"),
        (encrypted, "passphrase"),
        (b"", "no PEM private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no PEM private key"),
        (of_dsa, "not the key of"),
        (b"x" * ((1 << 20) + 1), "larger"),
    ):
        key.write_bytes(content)
        with pytest.raises(SettingsError, match=rf"tls-key .*{key}.*{why}"):
            server.certificates()
    key.write_bytes(good)
    for content in (b"", good, certificate.read_bytes()[:300]):
        certificate.write_bytes(content)
        with pytest.raises(
            SettingsError, match=rf"tls-certificate .*{certificate}.*no PEM certificate"
        ):
            server.certificates()
    certificate.unlink()
    with pytest.raises(SettingsError, match=rf"tls-certificate .*{certificate}.*No such file"):
        server.certificates()


def test_certificates_and_keys_are_paired(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    assert pairs(None, None) == []
    assert pairs([a, b], None) == [(a, a), (b, b)]
    assert pairs([a, b], [c, a]) == [(a, c), (b, a)]
    for certificates, keys in (([a, b], [c]), ([a], [b, c]), (None, [a])):
        with pytest.raises(SettingsError, match="tls-key"):
            pairs(certificates, keys)
