"""Proxies that answer devices while obdelta is down: a real haproxy with both overlays, and a real
nginx with the snippets of the Ingress.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.behind_haproxy import HOST, Keys, proxied
from tests.support.images import BASE_REPOSITORY, TARGET_REPOSITORY
from tests.support.processes import until
from tests.support.server import RunningServer, free_port, running_server

REGISTRY = "registry2.example.com"
BASE, TARGET = f"{REGISTRY}/{BASE_REPOSITORY}", f"{REGISTRY}/{TARGET_REPOSITORY}"
INGRESS = Path(__file__).parents[2] / "deploy/helm/ingress-nginx.yaml"
QUICK = ("inter 2s fall 10 rise 1", "inter 100ms fall 2 rise 1")


class Front:
    """The proxy that devices reach, on a port of this machine, as ``delta.example.com``."""

    def __init__(self, port: int, ca: Path | None) -> None:
        self._port, self._ca = port, ca

    def connected(self) -> http.client.HTTPConnection:
        """Returns a new connection, with TLS if there is any."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.connect()
        if self._ca is not None:
            context = ssl.create_default_context(cafile=str(self._ca))
            connection.sock = context.wrap_socket(connection.sock, server_hostname=HOST)
        return connection

    def ask(self, path: str, *, method: str = "GET", host: str = HOST) -> tuple[int, bytes]:
        """Sends a request on a separate connection, as devices do; the certificate is verified."""
        connection = self.connected()
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host)
        connection.putheader("Connection", "close")
        connection.endheaders()
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def delta(self, dest: str = TARGET, extra: str = "") -> tuple[int, bytes]:
        """Sends a device's request for a v3 delta, with unescaped names."""
        return self.ask(f"/api/v3/delta?src={BASE}&dest={dest}{extra}")

    def name(self, extra: str = "") -> str:
        """Returns the name in the answer, or an empty text."""
        status, body = self.delta(extra=extra)
        return str(json.loads(body)["name"]) if status == 200 else ""


@contextmanager
def behind(
    kind: str, keys: Keys, state: Path, upstream: str, port: int, **options: Any
) -> Iterator[RunningServer]:
    """The server as the overlay expects it."""
    if kind == "pass-through":
        options |= {
            "tls_certificate": str(keys.folder / "delta.pem"),
            "proxy_from": "proxy-protocol",
        }
    with running_server(
        state,
        upstream=upstream,
        port=port,
        registry_hosts=REGISTRY,
        public_url=f"https://{HOST}",
        **options,
    ) as server:
        yield server


@contextmanager
def haproxied(
    kind: str, keys: Keys, backend: int, replace: tuple[str, str] = QUICK
) -> Iterator[Front]:
    """A haproxy with one of the overlays."""
    with proxied(kind, keys, backend, replace=replace) as port:
        yield Front(port, keys.ca)


NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    # As with the controller's setting custom-http-errors, for all hosts.
    proxy_intercept_errors on;
    upstream delta {{ server 127.0.0.1:{backend} max_fails=0; }}
    server {{
        listen 127.0.0.1:{port};
        server_name {host};
{server}
        location / {{
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_read_timeout 960s;
{location}
            proxy_pass http://delta;
        }}
    }}
}}
"""
"""The relevant parts of the configuration that ingress-nginx makes of an Ingress, in the same
order.
"""


@contextmanager
def nginx(folder: Path, backend: int) -> Iterator[Front]:
    """Debian's nginx with the snippets; the controller itself cannot be had in tests."""
    annotations = yaml.safe_load(INGRESS.read_text())["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    port, config = free_port(), folder / "nginx.conf"
    config.write_text(
        NGINX.format(
            folder=folder,
            backend=backend,
            port=port,
            host=HOST,
            server=annotations[f"{prefix}server-snippet"],
            location=annotations[f"{prefix}configuration-snippet"],
        )
    )
    with subprocess.Popen(["/usr/sbin/nginx", "-p", str(folder), "-c", str(config)]) as process:
        try:
            front = Front(port, None)

            def answers() -> bool:
                try:
                    return front.ask("/")[0] > 0
                except ConnectionRefusedError:
                    assert process.poll() is None
                    return False

            until("nginx answers", answers)
            yield front
        finally:
            process.terminate()


@contextmanager
def front(kind: str, keys: Keys, backend: int) -> Iterator[Front]:
    """The proxy of this kind."""
    with nginx(keys.folder, backend) if kind == "nginx" else haproxied(kind, keys, backend) as made:
        yield made


CUTS = (ConnectionError, ssl.SSLError, http.client.HTTPException)


def outcome(device: Front, extra: str = "") -> str | int:
    """Returns the name, the status, or that the connection was cut."""
    try:
        status, body = device.delta(extra=extra)
    except CUTS:
        return "cut"
    return str(json.loads(body)["name"]) if status == 200 else status


def is_served(device: Front) -> bool:
    """Returns whether a builder's request is answered with a delta; like a device it repeats a cut
    request.
    """
    return str(outcome(device, "&wait=true")).startswith(f"{HOST}/")


def is_up(device: Front) -> bool:
    """Returns whether obdelta itself answers."""
    try:
        return device.ask("/healthz") == (200, b"ok\n")
    except CUTS:
        return False
