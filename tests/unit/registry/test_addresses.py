"""Addresses to which the upstream may lead this server, and the recipients of its password:
doubles of upstreams that try others.

Names and public addresses exist only in the test: a resolver maps each name, and all addresses
lead to loopback.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorPluggableNameResolver,
    IReactorTCP,
    IReactorTime,
    IResolutionReceiver,
)
from zope.interface import implementer

from obdelta.concurrency.reactor import IReactor
from obdelta.errors import Denied, UpstreamUnavailable
from obdelta.oci import Descriptor, Digest
from obdelta.registry import Credentials, RegistryClient
from obdelta.registry.addresses import AddressRules, kind_of
from tests.support.clients import Memory, reactor, running_threads
from tests.support.hostile import HostileUpstream, hostile_upstream, response

BODY = b"blob" * 5000
BLOB = Descriptor("", Digest.of(BODY), len(BODY))
PATH = f"/v2/v2/app/blobs/{BLOB.digest}"
PUBLIC = "203.0.113.7"
BUILDER = Credentials.basic("builder", "pa55word", exchange=True)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("0.0.0.0", "loopback"),
        ("::1", "loopback"),
        ("::", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("fc12::1", "private"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a00:1", "private"),
        ("2002:7f00:1::", "loopback"),
        ("203.0.113.7", None),
        ("172.32.0.1", None),
        ("8.8.8.8", None),
        ("2001:db8::1", None),
        ("::ffff:8.8.8.8", None),
    ],
)
def test_addresses_are_classified(address: str, kind: str | None) -> None:
    assert kind_of(address) == kind


@implementer(IReactorPluggableNameResolver, IReactorTCP, IReactorTime)
class Routed:
    """A double of the network: names resolve to ``addresses``, and every address is this machine's
    loopback.
    """

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        self.addresses = dict(addresses)
        self.connected: list[str] = []

    @property
    def nameResolver(self) -> IHostnameResolver:
        routed = self

        @implementer(IHostnameResolver, IHostResolution)
        class Resolver:
            name = ""

            def resolveHostName(
                self, receiver: IResolutionReceiver, host: str, portNumber: int = 0, *more: Any
            ) -> Any:
                receiver.resolutionBegan(self)
                for address in routed.addresses.get(host, [host] if host[0].isdigit() else []):
                    made = IPv6Address if ":" in address else IPv4Address
                    receiver.addressResolved(made("TCP", address, portNumber))
                receiver.resolutionComplete()
                return self

            def cancel(self) -> None:
                """Cancels nothing."""

        return Resolver()

    def connectTCP(self, host: str, port: int, *more: Any, **named: Any) -> Any:
        self.connected.append(host)
        return reactor.connectTCP("127.0.0.1", port, *more, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


@asynccontextmanager
async def routed_client(
    network: Routed, upstream: HostileUpstream, **options: Any
) -> AsyncIterator[RegistryClient]:
    port = upstream.url.rpartition(":")[2]
    with running_threads() as threads:
        client = RegistryClient.connect(
            cast(IReactor, network), f"http://registry.test:{port}", threads, **options
        )
        try:
            yield client
        finally:
            await client.close()


async def fetch(
    home: Sequence[str], location: str, there: Sequence[str] = (), **options: Any
) -> tuple[bytes | UpstreamUnavailable, list[str]]:
    """Returns the result of a redirect from an upstream with the addresses ``home``, and the
    addresses connected to.
    """
    network = Routed({"registry.test": home, "storage.test": there})
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        routed_client(network, upstream, **options) as client,
    ):
        port = storage.url.rpartition(":")[2]
        upstream.script(PATH, response(307, location=f"http://{location}:{port}/blob"))
        storage.script("/blob", response(200, BODY))
        sink = Memory()
        try:
            await client.blob("v2/app", BLOB, Credentials.bearer("s3cret"), sink)
        except UpstreamUnavailable as error:
            return error, network.connected
        return bytes(sink.content), network.connected


@pytest.mark.parametrize(
    ("location", "there", "kind"),
    [
        ("127.0.0.1", (), "loopback"),
        ("169.254.169.254", (), "link-local"),
        ("10.0.0.5", (), "private"),
        ("storage.test", ["127.0.0.1"], "loopback"),
        ("storage.test", ["192.168.7.7"], "private"),
        ("storage.test", ["::1"], "loopback"),
        ("storage.test", ["::ffff:10.0.0.5"], "private"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_public_upstream_cannot_redirect_to_private_addresses(
    location: str, there: list[str], kind: str
) -> None:
    found, connected = await fetch([PUBLIC], location, there)
    assert isinstance(found, UpstreamUnavailable)
    assert str(found).endswith(
        f"{location}, which has a {kind} address: add it to upstream-redirects to allow this"
    )
    assert connected == [PUBLIC]


@pytest.mark.parametrize(
    ("home", "location", "there", "options"),
    [
        ([PUBLIC], "storage.test", ["198.51.100.9"], {}),
        (["10.0.0.2"], "10.7.7.7", (), {}),
        (["172.18.0.3"], "storage.test", ["192.168.7.7"], {}),
        (["127.0.0.1"], "127.0.0.1", (), {}),
        (["127.0.0.1"], "storage.test", ["127.0.0.5"], {}),
        ([PUBLIC], "registry.test", (), {}),
        ([PUBLIC], "storage.test", ["192.168.7.7"], {"redirects": ["storage.test"]}),
        ([PUBLIC], "storage.test", ["192.168.7.7"], {"redirects": ["192.168.0.0/16"]}),
        ([PUBLIC], "10.0.0.5", (), {"redirects": ["10.0.0.5"]}),
        ([PUBLIC], "storage.test", ["10.0.0.5"], {"realms": ["storage.test:8443"]}),
        ([PUBLIC], "storage.test", ["10.0.0.5", "198.51.100.9"], {}),
    ],
)
@pytest_twisted.ensureDeferred
async def test_allowed_redirects_are_followed(
    home: list[str], location: str, there: list[str], options: dict[str, Any]
) -> None:
    found, connected = await fetch(home, location, there, **options)
    assert found == BODY
    if len(there) > 1:
        assert "10.0.0.5" not in connected


@pytest.mark.parametrize(
    ("home", "location"),
    [
        (["10.0.0.2"], "127.0.0.1"),
        (["10.0.0.2"], "169.254.169.254"),
        (["127.0.0.1"], "10.0.0.5"),
        # An upstream that also has public addresses counts as public: it may not lead to loopback.
        ([PUBLIC, "127.0.0.1"], "127.0.0.1"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_private_upstream_cannot_redirect_to_another_private_network(
    home: list[str], location: str
) -> None:
    found, _ = await fetch(home, location)
    assert isinstance(found, UpstreamUnavailable)


def test_a_name_is_checked_at_each_connection() -> None:
    rules = AddressRules("registry.test", allowed=["10.0.0.0/8"])
    assert rules.refused("storage.test", "198.51.100.9") is None
    assert rules.refused("storage.test", "127.0.0.1") == "loopback"
    assert rules.refused("storage.test", "10.1.1.1") is None
    rules.resolved("registry.test", ["127.0.0.1"])
    assert rules.refused("storage.test", "127.0.0.1") is None
    rules.resolved("registry.test", [PUBLIC])
    assert rules.refused("storage.test", "127.0.0.1") == "loopback"


# -- the builder's password --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("realms", "sent"), [((), False), (["token.test"], True), (["other.test"], False)]
)
@pytest_twisted.ensureDeferred
async def test_the_password_is_sent_only_to_configured_realms(
    realms: list[str], sent: bool
) -> None:
    network = Routed({"registry.test": [PUBLIC], "token.test": ["198.51.100.9"]})
    async with hostile_upstream() as upstream, hostile_upstream() as realm:
        port = realm.url.rpartition(":")[2]
        challenge = f'Bearer realm="http://token.test:{port}/token",service="registry.test"'
        upstream.script(PATH, response(401, www_authenticate=challenge), response(200, BODY))
        realm.script("/token", response(200, b'{"token": "t1"}'))
        async with routed_client(network, upstream, realms=realms) as client:
            if sent:
                await client.blob("v2/app", BLOB, BUILDER, Memory())
                assert (
                    realm.seen[0].header("authorization")
                    == "Basic " + base64.b64encode(b"builder:pa55word").decode()
                )
                assert upstream.seen[-1].header("authorization") == "Bearer t1"
            else:
                with pytest.raises(UpstreamUnavailable, match="add the host to token-realms"):
                    await client.blob("v2/app", BLOB, BUILDER, Memory())
                assert realm.seen == []


@pytest_twisted.ensureDeferred
async def test_a_realm_may_redirect_on_its_own_origin() -> None:
    network = Routed({"registry.test": [PUBLIC]})
    async with hostile_upstream() as upstream, hostile_upstream() as other:
        port = upstream.url.rpartition(":")[2]
        challenge = f'Bearer realm="http://registry.test:{port}/token",service="registry.test"'
        upstream.script(PATH, response(401, www_authenticate=challenge), response(200, BODY))
        upstream.script("/token", response(307, location="/v2/token?a b"))
        upstream.script("/v2/token", response(200, b'{"token": "t1"}'))
        async with routed_client(network, upstream) as client:
            await client.blob("v2/app", BLOB, BUILDER, Memory())
            assert [bool(seen.header("authorization")) for seen in upstream.seen] == [
                False,
                True,
                True,
                True,
            ]
        upstream.script(PATH, response(401, www_authenticate=challenge))
        upstream.script("/token", response(307, location=f"{other.url}/token"))
        async with routed_client(network, upstream) as client:
            with pytest.raises(UpstreamUnavailable, match="answered 307"):
                await client.blob("v2/app", BLOB, BUILDER, Memory())
        assert other.seen == []


@pytest.mark.parametrize("basic", [False, True])
@pytest_twisted.ensureDeferred
async def test_basic_challenges_are_answered_only_where_configured(basic: bool) -> None:
    network = Routed({"registry.test": [PUBLIC]})
    async with (
        hostile_upstream() as upstream,
        routed_client(network, upstream, basic=basic) as client,
    ):
        upstream.script(
            PATH, response(401, www_authenticate='Basic realm="registry"'), response(200, BODY)
        )
        if basic:
            await client.blob("v2/app", BLOB, BUILDER, Memory())
        else:
            with pytest.raises(Denied, match="set upstream-credentials = basic"):
                await client.blob("v2/app", BLOB, BUILDER, Memory())
        assert any(seen.header("authorization") for seen in upstream.seen) == basic
