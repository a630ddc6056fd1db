"""Proxies a device's request through a misbehaving upstream (a double), to a consumer that sets
the pace.
"""

from __future__ import annotations

import hashlib

import pytest
import pytest_twisted
from twisted.internet.defer import CancelledError
from twisted.web.http_headers import Headers

from obdelta.errors import Denied, UpstreamUnavailable
from obdelta.registry import Credentials, ProxiedRequest, ProxiedResponse
from tests.support.clients import Consumer, client_of
from tests.support.hostile import (
    Answer,
    Connection,
    Flood,
    chunked,
    dropping,
    hanging,
    head,
    hostile_upstream,
    response,
)

PATH = "/v2/v2/app/blobs/sha256:" + "a" * 64
BODY = hashlib.shake_128(b"relay").digest(300_000)
SECRET = Credentials.bearer("s3cret")


def get(headers: dict[bytes, list[bytes]] | None = None, method: bytes = b"GET") -> ProxiedRequest:
    return ProxiedRequest(method, PATH, Headers(headers or {}), SECRET, "v2/app")


async def body_of(answer: ProxiedResponse) -> bytes:
    consumer = Consumer()
    await answer.deliver(consumer)
    assert consumer.registered == 1 and consumer.producer is None
    return bytes(consumer.content)


@pytest_twisted.ensureDeferred
async def test_request_headers_are_filtered() -> None:
    sent = {
        b"accept": [b"a/one", b"b/two;q=0.5", b"c/three"],
        b"range": [b"bytes=7-"],
        b"if-none-match": [b'"x"'],
        b"user-agent": [b"docker/1"],
        b"accept-encoding": [b"gzip"],
        b"authorization": [b"Bearer of another"],
        b"cookie": [b"a=b"],
        b"host": [b"delta.example.com"],
        b"connection": [b"close, X-Private"],
        b"x-private": [b"1"],
        b"te": [b"trailers"],
    }
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, response(200, BODY))
        assert await body_of(await client.relay(get(sent))) == BODY
        headers = upstream.seen[0].headers
        assert headers["accept"] == ["a/one", "b/two;q=0.5", "c/three"]
        assert headers["range"] == ["bytes=7-"] and headers["if-none-match"] == ['"x"']
        assert headers["user-agent"] == ["docker/1"] and headers["accept-encoding"] == ["gzip"]
        assert headers["authorization"] == ["Bearer s3cret"]
        assert headers["host"] == [upstream.url.removeprefix("http://")]
        assert not {"cookie", "x-private", "te"} & headers.keys()


@pytest_twisted.ensureDeferred
async def test_response_headers_are_filtered() -> None:
    back = {
        "content_type": "application/octet-stream",
        "content_encoding": "gzip",
        "etag": '"e"',
        "set_cookie": "session=1",
        "keep_alive": "timeout=5",
        "proxy_authenticate": "Basic",
        "strict_transport_security": "max-age=1",
        "upgrade": "h2c",
    }
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, response(200, BODY, **back))
        answer = await client.relay(get())
        # A content coding stays as it came: the digest is of these bytes.
        assert await body_of(answer) == BODY
        assert {name.lower(): values for name, values in answer.headers.getAllRawHeaders()} == {
            b"content-type": [b"application/octet-stream"],
            b"content-encoding": [b"gzip"],
            b"content-length": [b"%d" % len(BODY)],
            b"etag": [b'"e"'],
        }


@pytest.mark.parametrize("status", [400, 401, 403, 404, 416, 429, 500, 503])
@pytest_twisted.ensureDeferred
async def test_error_statuses_are_passed_on_with_their_body(status: int) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(
            PATH,
            response(
                status, b'{"errors":[]}', www_authenticate='Bearer realm="r"', retry_after="9"
            ),
        )
        answer = await client.relay(get())
        assert (answer.status, await body_of(answer)) == (status, b'{"errors":[]}')
        assert answer.headers.getRawHeaders(b"www-authenticate") == [b'Bearer realm="r"']
        assert answer.headers.getRawHeaders(b"retry-after") == [b"9"]
        assert len(upstream.seen) == 1


@pytest_twisted.ensureDeferred
async def test_a_redirect_is_followed_here_without_credentials() -> None:
    async with (
        hostile_upstream() as upstream,
        hostile_upstream() as storage,
        client_of(upstream.url) as client,
    ):
        upstream.script(PATH, response(307, location=f"{storage.url}/blob?sig=1"))
        storage.script(
            "/blob", response(206, BODY[5:], content_range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}")
        )
        answer = await client.relay(get({b"range": [b"bytes=5-"]}))
        assert (answer.status, await body_of(answer)) == (206, BODY[5:])
        assert answer.headers.getRawHeaders(b"content-range") == [
            b"bytes 5-%d/%d" % (len(BODY) - 1, len(BODY))
        ]
        assert storage.seen[0].header("range") == "bytes=5-"
        assert "authorization" not in storage.seen[0].headers


@pytest.mark.parametrize(
    "answer",
    [
        dropping(BODY, 0),
        dropping(BODY, 100_000),
        chunked(BODY, piece=5000, whole=False),
        lambda connection: (
            connection.transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
            connection.drop(),
        ),
    ],
    ids=["nothing", "a third", "all chunks but the end", "no length"],
)
@pytest_twisted.ensureDeferred
async def test_a_body_that_breaks_off_is_a_failure(answer: Answer) -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, answer)
        consumer = Consumer()
        relayed = await client.relay(get())
        with pytest.raises(UpstreamUnavailable):
            await relayed.deliver(consumer)
        assert consumer.registered == 1 and consumer.producer is None
        assert BODY.startswith(bytes(consumer.content))
        relayed.cancel()


@pytest_twisted.ensureDeferred
async def test_an_error_page_may_end_with_its_connection() -> None:
    def unavailable(connection: Connection) -> None:
        connection.transport.write(
            b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\n\r\n<html>"
        )
        connection.drop()

    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, unavailable)
        answer = await client.relay(get())
        assert (answer.status, answer.length, await body_of(answer)) == (503, None, b"<html>")


@pytest_twisted.ensureDeferred
async def test_chunks_of_one_byte_are_proxied() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, chunked(BODY[:5000]))
        answer = await client.relay(get())
        assert (answer.length, await body_of(answer)) == (None, BODY[:5000])
        assert not answer.headers.hasHeader(b"content-length")


@pytest_twisted.ensureDeferred
async def test_a_slow_device_slows_the_upstream() -> None:
    flood = Flood(64 * 1024 * 1024)
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, flood)
        answer = await client.relay(get())

        class Slow(Consumer):
            def write(self, data: bytes) -> None:
                first = not self.content
                super().write(data)
                if first and self.producer is not None:
                    self.producer.pauseProducing()

        consumer = Slow()
        done = answer.deliver(consumer)
        await flood.stalled
        held = len(consumer.content)
        # One read, and the kernel's buffers on both sides.
        assert held <= 128 * 1024 and flood.sent < 24 * 1024 * 1024
        assert len(consumer.content) == held and not done.called and consumer.producer is not None
        consumer.producer.resumeProducing()
        await done
        assert len(consumer.content) == flood.size


@pytest_twisted.ensureDeferred
async def test_a_stalled_upstream_is_cut() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url, idle=0.2) as client:
        upstream.script(PATH, hanging())
        with pytest.raises(UpstreamUnavailable, match=r"did not answer within 0\.2 seconds"):
            await client.relay(get())
        upstream.script(PATH, hanging(head(200, {"content-length": "1000"}) + b"abc"))
        consumer = Consumer()
        answer = await client.relay(get())
        with pytest.raises(UpstreamUnavailable, match=r"nothing for 0\.2 seconds"):
            await answer.deliver(consumer)
        assert bytes(consumer.content) == b"abc" and consumer.producer is None
        await upstream.connections[-1].gone


@pytest_twisted.ensureDeferred
async def test_a_device_that_leaves_closes_the_upstream_s_connection() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, Flood())

        # Before delivery.
        answer = await client.relay(get())
        answer.cancel()
        answer.cancel()
        await upstream.connections[-1].gone

        # By the Deferred.
        answer = await client.relay(get())
        consumer = Consumer()
        done = answer.deliver(consumer)
        done.cancel()
        with pytest.raises(CancelledError):
            await done
        assert consumer.producer is None
        await upstream.connections[-1].gone

        # By the producer, twice.
        answer = await client.relay(get())
        consumer = Consumer()
        done = answer.deliver(consumer)
        producer = consumer.producer
        assert producer is not None
        producer.stopProducing()
        producer.stopProducing()
        with pytest.raises(CancelledError):
            await done
        await upstream.connections[-1].gone

        # While being registered: the device had left already.
        class Gone(Consumer):
            def registerProducer(self, producer, streaming) -> None:  # type: ignore[no-untyped-def]
                super().registerProducer(producer, streaming)
                producer.stopProducing()

        answer = await client.relay(get())
        consumer = Gone()
        with pytest.raises(CancelledError):
            await answer.deliver(consumer)
        assert bytes(consumer.content) == b"" and consumer.producer is None
        await upstream.connections[-1].gone
        assert len(upstream.connections) == 4


@pytest_twisted.ensureDeferred
async def test_connections_are_reused_also_after_a_device_paused() -> None:
    class Pausing(Consumer):
        def registerProducer(self, producer, streaming) -> None:  # type: ignore[no-untyped-def]
            super().registerProducer(producer, streaming)
            producer.pauseProducing()

    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, response(200, BODY))
        for _ in range(3):
            consumer = Pausing()
            answer = await client.relay(get())
            done = answer.deliver(consumer)
            assert not done.called and consumer.producer is not None
            consumer.producer.resumeProducing()
            await done
            assert bytes(consumer.content) == BODY
        assert len(upstream.connections) == 1


@pytest_twisted.ensureDeferred
async def test_head_and_fast_failures_are_retried() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        upstream.script(PATH, Connection.drop, Connection.drop, response(200, BODY))
        answer = await client.relay(get(method=b"HEAD"))
        assert (answer.status, answer.length, await body_of(answer)) == (200, 0, b"")
        assert answer.headers.getRawHeaders(b"content-length") == [b"%d" % len(BODY)]
        assert [seen.method for seen in upstream.seen] == ["HEAD"] * 3


@pytest_twisted.ensureDeferred
async def test_odd_paths_and_queries_stay_one_request_line() -> None:
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        request = ProxiedRequest(
            b"GET", "/v2/a b\r\nX: y/ü", Headers(), SECRET, None, b"n=5&last=a%20b \r\n"
        )
        answer = await client.relay(request)
        await body_of(answer)
        assert upstream.seen[0].path == "/v2/a%20b%0D%0AX:%20y/%C3%BC?n=5&last=a%20b%20%0D%0A"


@pytest_twisted.ensureDeferred
async def test_refused_server_credentials_are_not_answered_with_401() -> None:
    own = Credentials.basic("builder", "pa55word", exchange=True)
    async with hostile_upstream() as upstream, client_of(upstream.url) as client:
        for challenge in ('Basic realm="r"', "Negotiate", ""):
            upstream.script(PATH, response(401, b"", www_authenticate=challenge))
            with pytest.raises(Denied) as failure:
                await client.relay(ProxiedRequest(b"GET", PATH, Headers(), own, "v2/app"))
            assert "pa55word" not in str(failure.value)
