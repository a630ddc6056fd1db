"""The model of an update's seconds on a device (``docs/update-time.md``), and what was measured.

download = bytes / link
work = slowdown * (unpacking + index of the base + seconds of a command * commands)
seconds = max(download, work) + OVERLAP * min(download, work)
"""

from __future__ import annotations

from dataclasses import dataclass

from obdelta.delta.build import Effort
from obdelta.delta.effort import COMMAND_MICROSECONDS, OVERLAP
from obdelta.oci import Form

UNPACK = 0.008
"""Seconds in which the reference machine unpacks a MB of a layer. This constant and the next three
were fitted to pulls by engines 20 and 25 (``docs/update-time.md``).
"""
FILE = 85e-6
"""Seconds in which the reference machine creates a file of a layer, apart from its content."""
INDEX = 12e-6
"""Seconds in which it reads the record of one file of the base, before it applies a delta."""
COMMAND_RANGE = (6, 16, 40, 120)
"""Microseconds of a command that were measured on builds of engine 25."""
ENGINES = {Form.GZIP: "engine 20", Form.ZSTD: "engine 25"}
"""The engine that pulls each form."""


LINKS = {"metered": 0.0, "0.5 Mbit/s": 5e5, "2 Mbit/s": 2e6, "10 Mbit/s": 1e7}
"""Values of ``device-link``, in bits a second."""


@dataclass(frozen=True)
class Profile:
    """A device: its ``device-link``, and how many times slower than the reference machine it is.
    ``goals``: modelled time by form, as a share of the best alternative's.
    """

    setting: str
    slowdown: int
    goals: dict[Form, float]

    @property
    def name(self) -> str:
        """Both in words."""
        return f"{self.setting}, CPU/{self.slowdown}"

    @property
    def link(self) -> float:
        """Bits a second."""
        return LINKS[self.setting]


PROFILES = (
    Profile("0.5 Mbit/s", 10, {Form.ZSTD: 0.75, Form.GZIP: 0.80}),
    Profile("2 Mbit/s", 10, {Form.ZSTD: 0.92, Form.GZIP: 0.97}),
    Profile("10 Mbit/s", 5, {Form.ZSTD: 1.05, Form.GZIP: 1.10}),
)


@dataclass(frozen=True)
class Delta:
    """All delta layers of a pair: compressed bytes, and commands of their streams."""

    size: int
    commands: int


@dataclass(frozen=True)
class Measured:
    """A pair. ``unpacked``: bytes of the layers that differ. ``files``: their entries.
    ``base_files``: entries of all layers of the base. ``deltas`` by ``effort form link``.
    """

    name: str
    full: int
    unpacked: int
    files: int
    base_files: int
    engine: Delta
    deltas: dict[str, Delta]

    def has(self, effort: Effort) -> bool:
        """Whether deltas were measured at this effort."""
        return any(name.startswith(f"{effort.value} ") for name in self.deltas)

    def delta(self, effort: Effort, form: Form, link: str) -> Delta:
        """The delta of a setting."""
        return self.deltas[f"{effort.value} {form.value} {link}"]

    def seconds(
        self, delta: Delta, form: Form, profile: Profile, microseconds: float | None = None
    ) -> float:
        """The modelled seconds of an update by a delta, on the engine that pulls this form.

        ``microseconds``: a command's, if it is not the usual one.
        """
        if microseconds is None:
            microseconds = COMMAND_MICROSECONDS[form]
        work = self.unpacked / 2**20 * UNPACK + self.files * FILE
        if delta.commands:  # none in a full pull
            work += self.base_files * INDEX + delta.commands * microseconds / 1e6
        work *= profile.slowdown
        download = delta.size * 8 / profile.link
        return max(download, work) + OVERLAP * min(download, work)

    def update(self, form: Form, profile: Profile) -> float:
        """The seconds of an update with the device's own setting, at effort ``balanced``."""
        delta = self.delta(Effort.BALANCED, form, profile.setting)
        return self.seconds(delta, form, profile)

    def best(self, form: Form, profile: Profile) -> float:
        """The seconds of the best alternative: the engine's own delta, or a full pull."""
        return min(
            self.seconds(self.engine, form, profile),
            self.seconds(Delta(self.full, 0), form, profile),
        )
