"""Estimates of the devices of a fleet: their links, and the time that a command takes on them.

The seconds of a layer are modelled as in ``docs/update-time.md``:

    download, work = size / link, command * work
    seconds = max(download, work) + OVERLAP * min(download, work)

``work`` is the number of commands in the stream, plus some for unpacking what they make. Once it is
known which of the two is the longer one for each layer, two layers with different numbers of
commands for each byte give both unknowns of a device, ``link`` and ``command``. From more layers,
the median over all pairs is taken (Theil-Sen). That is repeated, beginning with the sum of both,
and what fits the layers best is taken. A fleet's estimate is the median over its devices.

A fleet needs at least :data:`MIN_DEVICES`, and each device has one vote. So one device that lies
changes little. Estimates stay within bounds, however many devices lie.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from obdelta.concurrency.tasks import SingleFlight, Threads
from obdelta.delta.effort import (
    DEFAULT_LINK,
    OVERLAP,
    UNPACKED_BYTES,
    command_price,
    command_prices,
)
from obdelta.errors import Unavailable
from obdelta.oci import Form
from obdelta.store.catalogue.tables.device_pulls import DeviceDownloads, MeasuredLayer
from obdelta.store.fleets import Fleets

log = Logger()

MIN_DEVICES = 20
SLOWEST_LINK, FASTEST_LINK = 64_000, 100_000_000
"""Bounds in bits a second. What is faster comes from a proxy that keeps the body, not a device."""
CHEAPEST_COMMAND, DEAREST_COMMAND = 5.0, 2500.0
"""Bounds in microseconds."""
MIN_SPREAD = 3.0
"""Two layers give the time of a command only if one has this many times more work for each byte
than the other.
"""
ROUNDS = 6
"""Times that a device's layers are fitted at most; mostly the third gives the second's result."""
KEPT_SECONDS = 60.0
"""Seconds for which estimates are used before they are computed again."""


@dataclass(frozen=True, slots=True)
class DeviceEstimate:
    """Devices of one fleet whose engines read the same form. ``link`` in bits a second, ``command``
    in microseconds; ``devices`` voted.
    """

    link: float
    command: float
    devices: int

    @property
    def price(self) -> float:
        """Returns the bytes that a command may cost."""
        return command_price(self.link, self.command)


@dataclass(frozen=True, slots=True)
class FleetEstimate:
    """The estimate of a fleet, by the repository that its devices were updated to last. ``engine``:
    the best form that their engines read.
    """

    repository: str
    engine: Form
    estimate: DeviceEstimate


def estimate(layers: Iterable[MeasuredLayer]) -> DeviceEstimate | None:
    """Returns the estimate from the measured layers of one fleet and engine; None if there are too
    few.
    """
    by_device: dict[str, list[MeasuredLayer]] = defaultdict(list)
    for layer in layers:
        by_device[layer.device].append(layer)
    votes = [vote for own in by_device.values() if (vote := _vote(own)) is not None]
    likely = [vote for vote in votes if vote[0] < _SLOWEST]
    if 2 * len(likely) > len(votes):
        votes = likely  # A few devices beyond the bound are broken, or lie.
    if len(votes) < MIN_DEVICES:
        return None
    byte, command = (median(values) for values in zip(*votes, strict=True))
    return DeviceEstimate(_rounded(8e6 / byte), _rounded(command), len(votes))


_FASTEST, _SLOWEST = 8e6 / FASTEST_LINK, 8e6 / SLOWEST_LINK
"""Microseconds a byte."""
_Point = tuple[float, float, float]
"""A layer's bytes, work and microseconds."""


def _vote(layers: Sequence[MeasuredLayer]) -> tuple[float, float] | None:
    """Returns a device's microseconds a byte and a command, within the bounds; None if its layers
    are too much alike.
    """
    points = [
        (
            float(layer.size),
            layer.commands + layer.target_size / UNPACKED_BYTES[layer.engine],
            1e6 * layer.seconds,
        )
        for layer in layers
        if 1e6 * layer.seconds > _FASTEST * layer.size
    ]
    found: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        vote = _fit(points, found[-1] if found else None)
        if vote is None or vote in found:
            break
        found.append(vote)
    return min(found, key=lambda vote: _misfit(points, vote), default=None)


def _fit(
    points: Sequence[_Point], before: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Returns a device's vote. ``before`` is the previous vote, from which it follows whether
    download or work takes longer for each layer. None: both count in full.
    """
    rates = []
    for size, work, taken in points:
        if before is not None and size * before[0] < work * before[1]:
            size *= OVERLAP
        elif before is not None:
            work *= OVERLAP
        rates.append((work / size, taken / size))
    rates.sort()
    slopes = [
        (y2 - y1) / (x2 - x1)
        for (x1, y1), (x2, y2) in combinations(rates, 2)
        if x2 > MIN_SPREAD * x1
    ]
    if not slopes:
        return None
    command = min(max(median(slopes), CHEAPEST_COMMAND), DEAREST_COMMAND)
    byte = median(y - command * x for x, y in rates)
    return min(max(byte, _FASTEST), _SLOWEST), command


def _misfit(points: Sequence[_Point], vote: tuple[float, float]) -> float:
    """Returns how far the model with a vote is from the measured times."""
    byte, command = vote
    misfit = 0.0
    for size, work, taken in points:
        times = size * byte, work * command
        misfit += abs(math.log(taken / (max(times) + OVERLAP * min(times))))
    return misfit


def _rounded(value: float) -> float:
    """Returns the value with two significant digits: it is not more precise."""
    return float(f"{value:.2g}")


class _Learned:
    """Estimates by fleet and by the best form that engines read, and the fleets themselves."""

    def __init__(self, layers: Sequence[MeasuredLayer]) -> None:
        self._fleets = Fleets(limit=2 * len(layers) + 2)
        for base, target in dict.fromkeys(
            (layer.base_repository, layer.target_repository) for layer in layers
        ):
            self._fleets.of(base, target)
        groups: dict[tuple[str, Form], list[MeasuredLayer]] = defaultdict(list)
        for layer in layers:
            groups[self._fleets.fleet(layer.target_repository), layer.engine].append(layer)
        self._found = {
            key: FleetEstimate(group[-1].target_repository, key[1], found)
            for key, group in groups.items()
            if (found := estimate(group)) is not None
        }

    def of(self, base: str, target: str) -> dict[Form, DeviceEstimate]:
        """Returns the estimates for an update between two repositories."""
        fleet = self._fleets.fleet(target, base)
        return {
            engine: found.estimate
            for (owner, engine), found in self._found.items()
            if owner == fleet
        }

    def all(self) -> list[FleetEstimate]:
        """Returns all estimates, those with the most devices first."""
        return sorted(
            self._found.values(), key=lambda found: (-found.estimate.devices, found.repository)
        )


class DeviceEstimates:
    """Estimates by fleet, of the downloads in the catalogue. All methods raise Unavailable."""

    def __init__(self, downloads: DeviceDownloads, threads: Threads, clock: IReactorTime) -> None:
        self._downloads, self._threads, self._clock = downloads, threads, clock
        self._learning: SingleFlight[None, _Learned] = SingleFlight()
        self._learned = _Learned([])
        self._until = -math.inf

    async def of(self, base: str, target: str) -> Mapping[Form, DeviceEstimate]:
        """Returns the estimates for an update between two repositories, by the best form that
        engines read.
        """
        return (await self._current()).of(base, target)

    async def fleets(self) -> Sequence[FleetEstimate]:
        """Returns all estimates, those with the most devices first."""
        return (await self._current()).all()

    async def _current(self) -> _Learned:
        if self._clock.seconds() < self._until:
            return self._learned
        return await self._learning.do(None, self._learn)

    async def _learn(self) -> _Learned:
        layers = await self._downloads.all()
        self._learned = await self._threads.run(_Learned, layers)
        self._until = self._clock.seconds() + KEPT_SECONDS
        return self._learned


class CommandPrices:
    """How many bytes a command may cost in each form, for the devices that an update is for.

    ``link``: the setting ``device-link``; with None it is learned. ``forms``: those that are built.
    """

    def __init__(
        self, link: float | None, estimates: DeviceEstimates, forms: Sequence[Form]
    ) -> None:
        self._link, self._estimates, self._forms = link, estimates, forms

    async def of(self, base: str, target: str) -> dict[Form, float]:
        """Returns the prices for an update between two repositories. Where too little was learned,
        they are the default ones.
        """
        if self._link is not None:
            return command_prices(self._link)
        prices = command_prices(DEFAULT_LINK)
        try:
            known = await self._estimates.of(base, target)
        except Unavailable as error:
            log.warn(
                "device estimates cannot be read: {reason}: the default prices are used",
                reason=str(error),
            )
            return prices
        for form, found in known.items():
            prices[form] = found.price
        for form in Form:
            # Without a form, engines that read it pull another one.
            pulling = [known[each] for each in known if each.best_of(self._forms) is form]
            if pulling:
                prices[form] = max(pulling, key=lambda found: found.devices).price
        return prices
