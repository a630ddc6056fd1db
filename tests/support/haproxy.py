"""A real haproxy on loopback, configured like openBalena's: same frontends and time-outs, other
ports.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

OVERLAY = Path(__file__).parent.parent.parent / "deploy/haproxy/overlay"
START_SECONDS = 60.0


def program() -> str:
    """Returns the path of haproxy, whose directory is not in every PATH."""
    return "/usr/sbin/haproxy" if Path("/usr/sbin/haproxy").exists() else "haproxy"


def openbalena(certificate: Path, port: int, inner_port: int, *, timeout: str = "63s") -> str:
    """Returns openBalena's haproxy.cfg for port 443, on other ports: TLS ends in a second step
    unless SNI says otherwise.

    ``certificate`` holds chain and key. Requests for other hosts get 503.
    """
    return f"""\
global
	maxconn 200

defaults
	default-server init-addr last,libc,none
	default-server inter 300ms rise 2 fall 3
	mode http
	option forwardfor
	timeout client {timeout}
	timeout connect 5s
	timeout http-keep-alive 1s
	timeout http-request {timeout}
	timeout server {timeout}
	timeout tunnel 3600s

resolvers docker-bridge-resolver
	nameserver docker-resolver 127.0.0.1:9
	hold valid 0ms

frontend tcp-router
	mode tcp
	bind 127.0.0.1:{port}
	bind [::1]:{port}
	tcp-request inspect-delay 2s
	tcp-request content accept if {{ req.ssl_hello_type 1 }}
	acl is_ssl req.ssl_ver 2:3.4
	acl sni-host-tunnel req_ssl_sni -m beg "tunnel."
	use_backend redirect-to-https if sni-host-tunnel
	use_backend redirect-to-https if is_ssl

backend redirect-to-https
	mode tcp
	server localhost 127.0.0.1:{inner_port} send-proxy-v2

frontend https
	bind 127.0.0.1:{inner_port} ssl crt {certificate} alpn h2,http/1.1 accept-proxy
	default_backend api-backend
	http-request add-header X-Forwarded-Proto https
	acl host-api-backend hdr_beg(host) -i "api."
	use_backend api-backend if host-api-backend

backend api-backend
	http-request return status 503 content-type text/plain string "the API"
"""


def overlaid(kind: str, config: str) -> str:
    """Returns a configuration with one of our overlays (``pass-through``, ``host-routing``), made
    by the operators' tool.
    """
    done = subprocess.run(
        [str(OVERLAY), kind], input=config.encode(), capture_output=True, check=True
    )
    return done.stdout.decode()


def check(config: Path, environment: Mapping[str, str] | None = None) -> str:
    """Runs ``haproxy -c``; returns its output if the configuration is valid, else raises
    CalledProcessError.
    """
    done = subprocess.run(
        [program(), "-c", "-f", str(config)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return done.stdout.decode()


@contextmanager
def running(
    config: str, folder: Path, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Runs haproxy for the block, from the moment when ``port`` answers."""
    path = folder / "haproxy.cfg"
    path.write_text(config)
    check(path, environment)
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(
            [program(), "-db", "-f", str(path)],
            env={**os.environ, **(environment or {})},
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_up(process, port, folder / "haproxy.log")
            yield
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"haproxy ended: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            probe.settimeout(0.2)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"haproxy does not answer: {log.read_text()[-2000:]}")
