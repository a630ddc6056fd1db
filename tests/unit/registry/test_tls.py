"""TLS to the upstream: with the real docker-registry and certificates of the tests, and a TLS
double for faults that it never has.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_twisted
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from twisted.internet.defer import CancelledError
from twisted.internet.ssl import PrivateCertificate
from twisted.web.http_headers import Headers

from bench.images import push
from obdelta.errors import SettingsError, UpstreamUnavailable
from obdelta.oci import Digest
from obdelta.oci.manifest import DOCKER_MANIFEST
from obdelta.registry import Credentials, ProxiedRequest, RegistryClient
from tests.support.clients import Consumer, Memory, client_of, reactor, running_threads
from tests.support.hostile import Flood, hostile_upstream, response, small_manifest
from tests.support.images import make_pair
from tests.support.registry import RunningRegistry, plain_registry, running_registry
from tests.support.tokens import private_pem

__all__ = ["plain_registry"]

ANONYMOUS = Credentials.anonymous()
PATH = "/v2/v2/app/manifests/latest"
NOW = datetime.datetime.now(datetime.UTC)


@dataclass
class Authority:
    """A certificate authority; ``bundle`` is its PEM file."""

    directory: Path
    name: str

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        made = self._builder(self.subject, self.key, 30).add_extension(constraints, critical=True)
        self.certificate = made.sign(self.key, hashes.SHA256())
        self.bundle = self.directory / f"{self.name}.pem"
        self.bundle.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(days=2))
            .not_valid_after(NOW + datetime.timedelta(days=days))
        )

    def issue(self, name: str | ipaddress.IPv4Address, *, days: int = 30) -> tuple[Path, Path]:
        """Returns the paths of a certificate for the name, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        names: list[x509.GeneralName] = [
            x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name)
        ]
        made = self._builder(subject, key, days).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        paths = self.directory / f"{name}-{days}.crt", self.directory / f"{name}-{days}.key"
        paths[0].write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))
        paths[1].write_bytes(private_pem(key))
        return paths

    def served(self, name: str | ipaddress.IPv4Address, *, days: int = 30) -> PrivateCertificate:
        """Returns the same for a double."""
        certificate, key = self.issue(name, days=days)
        loaded: PrivateCertificate = PrivateCertificate.loadPEM(
            certificate.read_bytes() + key.read_bytes()
        )
        return loaded


@pytest.fixture(scope="module")
def own_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("own_authority"), "own_authority")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other_authority"), "other_authority")


@pytest_twisted.ensureDeferred
async def test_a_real_registry_with_a_private_authority(
    tmp_path: Path, own_authority: Authority, other_authority: Authority
) -> None:
    image = make_pair(tmp_path / "pair").base
    with running_registry(tmp_path / "data") as plain:
        push(image, plain.url, "v2/app", "latest")
    both = tmp_path / "both.pem"
    both.write_bytes(
        b"a comment\n"
        + other_authority.bundle.read_bytes()
        + b"\n"
        + own_authority.bundle.read_bytes()
    )
    with running_registry(
        tmp_path / "data", certificate=own_authority.issue("localhost")
    ) as registry:
        for bundle in (own_authority.bundle, both):
            async with client_of(registry.url, ca=bundle) as client:
                manifest = await client.manifest("v2/app", "latest", ANONYMOUS)
                assert manifest.digest == image.digest
                sink = Memory()
                await client.blob("v2/app", manifest.layers[1], ANONYMOUS, sink)  # type: ignore[union-attr]
                assert Digest.of(bytes(sink.content)) == image.layers[1].digest
        for wrong in (other_authority.bundle, None):
            async with client_of(registry.url, ca=wrong) as client:
                with pytest.raises(
                    UpstreamUnavailable,
                    match=r"no TLS connection to localhost:\d+: certificate verify failed: unable"
                    " to get local issuer certificate: name its authority in upstream-ca",
                ):
                    await client.manifest("v2/app", "latest", ANONYMOUS)
        # The certificate is for localhost, not for its address.
        async with client_of(
            registry.url.replace("localhost", "127.0.0.1"), ca=own_authority.bundle
        ) as client:
            with pytest.raises(
                UpstreamUnavailable,
                match=r"certificate of 127\.0\.0\.1:\d+ is for another name: it has localhost: use",
            ):
                await client.manifest("v2/app", "latest", ANONYMOUS)


@pytest.mark.parametrize(
    ("name", "days", "words"),
    [
        ("registry.example.com", 30, "is for another name"),
        ("localhost.example.com", 30, "is for another name"),
        ("*.localhost", 30, "has names that cannot be checked"),
        ("*", 30, "has names that cannot be checked"),
        ("localhost", -1, "certificate verify failed: certificate has expired: renew it"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_certificates_that_are_refused(
    own_authority: Authority, name: str, days: int, words: str
) -> None:
    async with (
        hostile_upstream(own_authority.served(name, days=days), "localhost") as upstream,
        client_of(upstream.url, ca=own_authority.bundle) as client,
    ):
        with pytest.raises(UpstreamUnavailable, match=words):
            await client.manifest("v2/app", "latest", Credentials.bearer("s3cret"))
        assert upstream.seen == []
        assert len(upstream.connections) <= 1  # not tried again


@pytest_twisted.ensureDeferred
async def test_plain_text_instead_of_tls_is_a_clear_error(plain_registry: RunningRegistry) -> None:
    async with client_of(plain_registry.url.replace("http://", "https://")) as client:
        with pytest.raises(UpstreamUnavailable, match="no TLS connection"):
            await client.manifest("v2/app", "latest", ANONYMOUS)


@pytest_twisted.ensureDeferred
async def test_system_authorities_are_trusted_for_storage_only(
    own_authority: Authority, other_authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(other_authority.bundle))
    address = ipaddress.IPv4Address("127.0.0.1")
    good = response(200, small_manifest(), content_type=DOCKER_MANIFEST)
    async with (
        hostile_upstream(own_authority.served("localhost"), "localhost") as upstream,
        hostile_upstream(other_authority.served(address)) as storage,
        client_of(upstream.url, ca=own_authority.bundle) as client,
    ):
        upstream.script(PATH, response(307, location=f"{storage.url}/blob"))
        storage.script("/blob", good)
        assert (await client.manifest("v2/app", "latest", ANONYMOUS)).raw == small_manifest()
    async with (
        hostile_upstream(other_authority.served("localhost"), "localhost") as upstream,
        client_of(upstream.url, ca=own_authority.bundle) as client,
    ):
        with pytest.raises(UpstreamUnavailable, match="certificate verify failed"):
            await client.manifest("v2/app", "latest", ANONYMOUS)
    async with (
        hostile_upstream(other_authority.served("localhost"), "localhost") as upstream,
        client_of(upstream.url) as client,
    ):
        upstream.script(PATH, good)
        assert (await client.manifest("v2/app", "latest", ANONYMOUS)).raw == small_manifest()


@pytest_twisted.ensureDeferred
async def test_back_pressure_and_leaving_over_tls(own_authority: Authority) -> None:
    flood = Flood(48 * 1024 * 1024)
    async with (
        hostile_upstream(own_authority.served("localhost"), "localhost") as upstream,
        client_of(upstream.url, ca=own_authority.bundle) as client,
    ):
        upstream.script(PATH, flood, Flood())

        class Slow(Consumer):
            def write(self, data: bytes) -> None:
                first = not self.content
                super().write(data)
                if first and self.producer is not None:
                    self.producer.pauseProducing()

        consumer = Slow()
        answer = await client.relay(ProxiedRequest(b"GET", PATH, Headers(), ANONYMOUS))
        done = answer.deliver(consumer)
        await flood.stalled
        assert flood.sent < 24 * 1024 * 1024 and len(consumer.content) < 1024 * 1024
        assert consumer.producer is not None
        consumer.producer.resumeProducing()
        await done
        assert len(consumer.content) == flood.size

        answer = await client.relay(ProxiedRequest(b"GET", PATH, Headers(), ANONYMOUS))
        done = answer.deliver(Slow())
        done.cancel()
        with pytest.raises(CancelledError):
            await done
        await upstream.connections[-1].gone


def test_unusable_bundles_are_refused(tmp_path: Path) -> None:
    files = {
        "empty": b"",
        "text": b"hello",
        "broken": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with running_threads() as threads:
        for name in (*files, "missing", "."):
            with pytest.raises(SettingsError) as failure:
                RegistryClient.connect(reactor, "https://localhost", threads, ca=tmp_path / name)
            assert failure.value.key == "upstream-ca"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "registry.example.com",
        "ftp://x",
        "https://u:p@x",
        "https://x/path",
        "https://x?q",
        "https://x#f",
        "https://x:0",
    ],
)
def test_invalid_upstream_urls_are_refused(url: str) -> None:
    with running_threads() as threads, pytest.raises(SettingsError) as failure:
        RegistryClient.connect(reactor, url, threads)
    assert failure.value.key == "upstream"
