"""A model of many fleets before one obdelta: releases arrive, workers build, devices ask and pull.

It knows nothing of bytes or images. Each build takes the seconds of a measured pair, and each delta
has the bytes of that pair. Releases arrive as a Poisson process. Builds wait in one queue, first
come first served. Devices learn of a release within a polling interval, at random.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BUCKET = 60.0
"""Seconds over which peaks of traffic are averaged."""
MAX_VERSIONS = 40
"""Versions of one fleet in the field, at most."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of update, as measured: seconds of a build with nothing cached, and with the base's
    index cached; bytes of the delta.
    """

    name: str
    cold: float
    indexed: float
    delta_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a simulation.

    ``fleets`` differ in size: the n-th largest has a share of 1 / (n + 10) of the ``devices``. Each
    release changes one to three images. ``behind``: the share of devices that are one release
    behind those of the version before. ``poll``: seconds within which a device learns of a release.
    ``link``: bytes a second of a device. ``indexed``: the share of builds that find the index of
    their base cached.
    """

    devices: int = 1_000_000
    fleets: int = 10_000
    releases_per_minute: float = 1.0
    images: tuple[int, ...] = (1, 1, 2, 3)
    behind: float = 0.3
    poll: float = 900.0
    link: float = 1.25e6
    indexed: float = 0.5
    hours: float = 24.0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Figures of one run. Times are in seconds, traffic in bytes a second.

    ``busy``: the share of the workers' time. ``ready``: from a release to the last of its deltas,
    one a release. ``waits``: how long each device that asked before its delta existed had to wait.
    ``updates``: devices that updated. ``peak_bytes``, ``peak_devices``: of the busiest minute.
    """

    releases: int
    builds: int
    busy: float
    longest_queue: int
    left: int
    ready: list[float]
    waits: list[float]
    updates: int
    mean_bytes: float
    peak_bytes: float
    peak_devices: float


def fleet_sizes(load: Load) -> list[int]:
    """Returns the devices of each fleet, largest first; each fleet has at least one."""
    weights = [1 / (number + 10) for number in range(1, load.fleets + 1)]
    total = sum(weights)
    return [max(1, round(load.devices * weight / total)) for weight in weights]


def versions(size: int, behind: float, chance: random.Random) -> list[int]:
    """Returns how many devices of a fleet run each version in the field, newest first."""
    left, found = size, list[int]()
    while left and len(found) < MAX_VERSIONS - 1:
        # The binomial count of those that are not further behind; exact where it matters.
        mean = left * (1 - behind)
        spread = math.sqrt(mean * behind)
        count = (
            sum(chance.random() >= behind for _ in range(left))
            if left < 50
            else min(left, max(0, round(chance.gauss(mean, spread))))
        )
        if count:
            found.append(count)
        left -= count
    return found + ([left] if left else [])


def simulate(
    load: Load, kinds: Sequence[Kind], slots: int, *, builds_only: bool = False
) -> Outcome:
    """Returns the figures for so many builds at a time. The same load and seed have the same
    releases for any number of slots. ``builds_only``: without those of devices, which take longest.
    """
    chance, device_chance = random.Random(load.seed), random.Random(load.seed + 1)
    sizes, end = fleet_sizes(load), load.hours * 3600
    queue = _Queue(slots)
    ready: list[float] = []
    waits: list[float] = []
    sent: Counter[int] = Counter()
    updates = releases = builds = 0
    for at in _arrivals(load.releases_per_minute / 60, end, chance):
        releases += 1
        field = versions(sizes[chance.randrange(load.fleets)], load.behind, chance)
        jobs = []
        for devices, _ in itertools.product(field, range(chance.choice(load.images))):
            kind = chance.choice(kinds)
            seconds = kind.indexed if chance.random() < load.indexed else kind.cold
            jobs.append((devices, kind, seconds))
        builds += len(jobs)
        done = 0.0
        for devices, kind, seconds in jobs:
            finished = queue.put(at, seconds)
            done = max(done, finished - at)
            for _ in range(0 if builds_only else devices):
                asks = at + device_chance.random() * load.poll
                starts = max(asks, finished)
                if starts > asks:
                    waits.append(starts - asks)
                sent[int(starts / BUCKET)] += kind.delta_bytes
        updates += sum(field)
        ready.append(done)
    minutes = [sent[minute] / BUCKET for minute in range(int(end / BUCKET))] or [0.0]
    return Outcome(
        releases=releases,
        builds=builds,
        busy=min(1.0, queue.seconds / (slots * end)),
        longest_queue=queue.longest,
        left=queue.waiting(end),
        ready=ready,
        waits=waits,
        updates=updates,
        mean_bytes=sum(minutes) / len(minutes),
        peak_bytes=max(minutes),
        peak_devices=max(minutes) / load.link,
    )


def makespan(seconds: Sequence[float], slots: int) -> float:
    """Returns the seconds for builds that are all queued at once."""
    queue = _Queue(slots)
    return max((queue.put(0.0, each) for each in seconds), default=0.0)


class _Queue:
    """Builds in order of arrival, and the times at which slots become free."""

    def __init__(self, slots: int) -> None:
        self._free = [0.0] * slots
        self._starts: deque[float] = deque()
        self.seconds = 0.0
        self.longest = 0

    def put(self, at: float, seconds: float) -> float:
        """Returns when a build that is queued at a time will have ended."""
        start = max(at, heapq.heappop(self._free))
        heapq.heappush(self._free, start + seconds)
        self.seconds += seconds
        while self._starts and self._starts[0] <= at:
            self._starts.popleft()
        if start > at:
            self._starts.append(start)
        self.longest = max(self.longest, len(self._starts))
        return start + seconds

    def waiting(self, at: float) -> int:
        """Returns how many builds have not begun at a time."""
        return sum(start > at for start in self._starts)


def _arrivals(rate: float, end: float, chance: random.Random) -> Iterator[float]:
    at = chance.expovariate(rate)
    while at < end:
        yield at
        at += chance.expovariate(rate)


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value that a share of all does not exceed; 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
