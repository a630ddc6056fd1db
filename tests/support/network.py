"""Separate machines: network namespaces on one bridge, each of which can be cut off and joined
again. Must be root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def _ip(*words: str, wrong: bool = True) -> None:
    subprocess.run(["ip", *words], check=wrong, capture_output=not wrong)


@dataclass(frozen=True)
class Machine:
    """``address`` is its address for the others."""

    address: str
    namespace: str
    cable: str

    def command(self, words: list[str]) -> list[str]:
        """Returns the command that runs another one in this network."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def cut(self) -> None:
        """Cuts the cable; programs in this network continue without any connection."""
        _ip("link", "set", self.cable, "down")

    def join(self) -> None:
        """Connects it again."""
        _ip("link", "set", self.cable, "up")


@dataclass(frozen=True)
class Network:
    """``address`` is the address of this machine, on which the test runs."""

    address: str
    machines: list[Machine]


@contextmanager
def running_network(count: int) -> Iterator[Network]:
    """Yields a network of this number of machines besides this one."""
    mark, subnet = f"ob{os.getpid() % 100_000}", f"10.213.{os.getpid() % 250}"
    machines = [
        Machine(f"{subnet}.{number + 2}", f"{mark}-{number}", f"{mark}v{number}")
        for number in range(count)
    ]
    try:
        _ip("link", "add", mark, "type", "bridge")
        _ip("address", "add", f"{subnet}.1/24", "dev", mark)
        _ip("link", "set", mark, "up")
        for machine in machines:
            _ip("netns", "add", machine.namespace)
            _ip(
                "link",
                "add",
                machine.cable,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                machine.namespace,
            )
            _ip("link", "set", machine.cable, "master", mark, "up")
            _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", machine.namespace, "link", "set", device, "up")
        yield Network(f"{subnet}.1", machines)
    finally:
        for machine in machines:
            _ip("netns", "delete", machine.namespace, wrong=False)
        _ip("link", "delete", mark, wrong=False)
