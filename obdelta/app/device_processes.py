"""``processes = N``: starts N - 1 other server processes that serve the devices' ports."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort

from obdelta.app.devices import ServerParts
from obdelta.errors import SettingsError
from obdelta.net.private_socket import listen_on_private_socket
from obdelta.processes.server_processes import FIRST_INHERITED, Processes
from obdelta.settings import Settings, table
from obdelta.web.devices.app import DeviceApp
from obdelta.web.devices.forwarding import BOUNDS
from obdelta.web.request import IdentifiedRequest, QuietSite

FOLDER = FIRST_INHERITED
"""The descriptor of the private socket's directory, in the other processes."""
FIRST_PORT = FIRST_INHERITED + 1
"""The descriptor of the first listening socket there."""
_MODULE = "obdelta.app.server_process"


@dataclass(frozen=True, slots=True)
class StartMessage:
    """The first message to another server process: the settings, and the address families of the
    listening sockets that it inherits.
    """

    settings: Settings
    families: tuple[int, ...]
    url_key: bytes
    """Signs URLs of v2 batches. It may derive from a secret that these processes do not get."""

    def encode(self) -> bytes:
        """Returns the message as bytes. It holds no secret setting: the other process needs none,
        and it parses untrusted input.
        """
        secrets = {row.field: None for row in table() if row.secret}
        plain = dataclasses.replace(
            self.settings,
            origins=dict(self.settings.origins),
            texts=dict(self.settings.texts),
            log_level=dict(self.settings.log_level),
            **secrets,  # type: ignore[arg-type] # which fields they are is known at run time only
        )
        return pickle.dumps(dataclasses.replace(self, settings=plain))


def start_processes(
    server: ServerParts, app: DeviceApp, ports: Sequence[IListeningPort]
) -> DeviceProcesses | None:
    """Starts the other server processes once the devices' ports are open. Returns None if there
    are none.
    """
    parts, configured, reactor = server.parts, server.parts.settings, server.parts.reactor
    if configured.processes == 1:
        return None
    for text in configured.listen:
        if text.startswith("ssl:"):
            raise SettingsError(
                "listen",
                text,
                "a tcp: endpoint (TLS comes from tls-certificate), with processes > 1",
            )
    shared = [found for port in ports if (found := getattr(port, "socket", None)) is not None]
    shared = [found for found in shared if found.family in (socket.AF_INET, socket.AF_INET6)]
    if not shared:
        raise SettingsError(
            "listen", " ".join(configured.listen), "a tcp: endpoint among them, with processes > 1"
        )
    # The other process has already logged the request that it forwards.
    site = QuietSite(app, requestFactory=IdentifiedRequest, reactor=reactor, bounds=BOUNDS)
    port, folder = listen_on_private_socket(parts.state.blobs.temporary(".socket"), site, reactor)
    families = tuple(found.family for found in shared)
    message = StartMessage(configured, families, server.devices.signer.key)
    processes = Processes(
        reactor,
        [sys.executable, "-P", "-m", _MODULE],
        message.encode(),
        [folder, *(found.fileno() for found in shared)],
        configured.processes - 1,
        parts.metrics,
        app.traces.absorb,
    )

    async def close() -> None:
        processes.end(configured.drain)
        await processes.ended()
        await maybeDeferred(port.stopListening)
        os.close(folder)

    parts.services.add_stop(close)
    processes.start()
    return DeviceProcesses(processes, message)


class DeviceProcesses:
    """The other server processes, for the rest of the server."""

    def __init__(self, processes: Processes, message: StartMessage) -> None:
        self._processes, self._message = processes, message
        self.describe, self.end = processes.describe, processes.end

    def reload(self, levels: Mapping[str, str]) -> None:
        """Makes the processes read their files again, with other log levels. Processes that start
        later get these levels too.
        """
        settings = dataclasses.replace(self._message.settings, log_level=dict(levels))
        self._message = dataclasses.replace(self._message, settings=settings)
        self._processes.first_message = self._message.encode()
        self._processes.send_line(json.dumps({"log_level": dict(levels)}).encode())
