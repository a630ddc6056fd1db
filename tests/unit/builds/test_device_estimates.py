"""Estimates from simulated fleets, whose links and processors are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from obdelta.builds.delta_size_limit import DeltaTooLarge, check_delta_size
from obdelta.builds.device_estimates import (
    CHEAPEST_COMMAND,
    DEAREST_COMMAND,
    FASTEST_LINK,
    KEPT_SECONDS,
    MIN_DEVICES,
    SLOWEST_LINK,
    CommandPrices,
    DeviceEstimates,
    estimate,
)
from obdelta.delta.effort import DEFAULT_PRICES, OVERLAP, UNPACKED_BYTES, command_prices
from obdelta.errors import Unavailable
from obdelta.oci import Form
from obdelta.store.catalogue.tables.device_pulls import DeviceDownloads, MeasuredLayer
from tests.support.store import real_threads

MB = 1 << 20
DELTAS = [
    # Bytes, commands and unpacked bytes of layers: wheels, packages, a daemon, media files.
    (8_500_000, 118_000, 60 * MB),
    (3_200_000, 190_000, 90 * MB),
    (3_000_000, 40_000, 35 * MB),
    (20_000_000, 9_000, 64 * MB),
]


def fleet(
    seed: int,
    *,
    link: float,
    command: float,
    devices: int = 120,
    engine: Form = Form.GZIP,
    deltas: Sequence[tuple[int, int, int]] = DELTAS,
    spread: float = 0.3,
    noise: float = 0.08,
) -> list[MeasuredLayer]:
    """Returns the downloads of a fleet: links and processors of its devices differ by ``spread``,
    each download by ``noise``, and one in twenty stalls for a while.
    """
    chosen = random.Random(seed)
    layers = []
    for number in range(devices):
        own_link = link * chosen.lognormvariate(0, spread)
        own_command = command * chosen.lognormvariate(0, spread)
        unpacking = chosen.uniform(0.5, 1.5) / UNPACKED_BYTES[engine]
        for size, commands, target_size in chosen.sample(deltas, chosen.randint(2, len(deltas))):
            work = commands + unpacking * target_size
            times = 8 * size / own_link, own_command * work / 1e6
            seconds = (max(times) + OVERLAP * min(times)) * chosen.gauss(1, noise)
            if chosen.random() < 0.05:
                seconds += chosen.uniform(10, 300)
            layers.append(
                MeasuredLayer(
                    f"device {number}",
                    "app/1",
                    "app/2",
                    engine,
                    size,
                    commands,
                    target_size,
                    max(seconds, 0.001),
                )
            )
    return layers


def with_liars(
    layers: list[MeasuredLayer], seconds: float, percent: int = 10
) -> list[MeasuredLayer]:
    """Returns the layers, where this number of 100 devices claim a false time for each."""
    return [
        replace(layer, seconds=seconds) if _number(layer) % 100 < percent else layer
        for layer in layers
    ]


def _number(layer: MeasuredLayer) -> int:
    return int(layer.device.split()[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("engine", list(Form))
@pytest.mark.parametrize("lie", [None, 0.001, 1e6])
@pytest.mark.parametrize("link", [500_000, 2_000_000, 10_000_000])
@pytest.mark.parametrize("command", [160, 400])
def test_estimates_of_known_fleets_are_within_a_quarter(
    seed: int, engine: Form, lie: float | None, link: float, command: float
) -> None:
    layers = fleet(seed, link=link, command=command, engine=engine)
    if lie is not None:
        layers = with_liars(layers, lie)
    found = estimate(layers)
    assert found is not None
    assert found.link == pytest.approx(link, rel=0.25)
    assert found.command == pytest.approx(command, rel=0.25)
    assert MIN_DEVICES <= found.devices <= 120


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(DELTAS), st.floats(1e-9, 1e12))),
    st.sampled_from(Form),
)
def test_estimates_stay_within_their_bounds(
    claims: list[tuple[int, tuple[int, int, int], float]], engine: Form
) -> None:
    layers = [
        MeasuredLayer(f"device {number}", "app/1", "app/2", engine, *delta, seconds)
        for number, delta, seconds in claims
    ]
    found = estimate(layers)
    if found is not None:
        assert SLOWEST_LINK <= found.link <= FASTEST_LINK
        assert CHEAPEST_COMMAND <= found.command <= DEAREST_COMMAND


@pytest.mark.parametrize("seconds", [[1e9, 1e12], [1.0, 1e12], [1e12, 1.0]])
def test_false_reports_move_an_estimate_only_to_its_bounds(seconds: list[float]) -> None:
    layers = [
        replace(layer, seconds=seconds[layer.commands > 100_000])
        for layer in fleet(1, link=2e6, command=200)
    ]
    found = estimate(layers)
    assert found is not None
    assert SLOWEST_LINK <= found.link <= FASTEST_LINK
    assert CHEAPEST_COMMAND <= found.command <= DEAREST_COMMAND


@pytest.mark.parametrize("lie", [0.5, 1e6])
def test_four_false_devices_in_ten_keep_estimates_in_the_honest_range(lie: float) -> None:
    honest = fleet(3, link=2e6, command=200)
    each = [
        estimate(
            [replace(layer, device=f"{layer.device} {copy}") for copy in range(20) for layer in own]
        )
        for own in _by_device(honest)
    ]
    alone = [one for one in each if one is not None]
    found = estimate(with_liars(honest, lie, 40))
    assert found is not None
    assert min(one.link for one in alone) <= found.link <= max(one.link for one in alone)
    assert min(one.command for one in alone) <= found.command
    assert found.command <= max(one.command for one in alone)


def _by_device(layers: Sequence[MeasuredLayer]) -> list[list[MeasuredLayer]]:
    own: dict[str, list[MeasuredLayer]] = {}
    for layer in layers:
        own.setdefault(layer.device, []).append(layer)
    return list(own.values())


def test_a_device_has_one_vote() -> None:
    layers = fleet(4, link=2e6, command=200, devices=MIN_DEVICES, deltas=DELTAS[:2])
    assert estimate(layers) is not None
    many = [layer for layer in layers if layer.device != "device 0"] * 10
    assert estimate(many) is None


def test_layers_that_are_all_alike_change_no_estimate() -> None:
    alike = [(3_000_000, 40_000, 30 * MB), (4_000_000, 55_000, 40 * MB)]
    assert estimate(fleet(5, link=2e6, command=200, deltas=alike)) is None


def test_a_caching_proxy_is_not_counted_as_a_device() -> None:
    layers = [replace(layer, seconds=layer.size / 1e9) for layer in fleet(6, link=2e6, command=200)]
    assert estimate(layers) is None


class _Downloads(DeviceDownloads):
    """The table of downloads, as a list."""

    def __init__(self, layers: list[MeasuredLayer]) -> None:
        self.layers = layers

    async def all(self) -> list[MeasuredLayer]:
        return self.layers


@pytest_twisted.ensureDeferred
async def test_the_next_release_uses_the_estimates_of_its_fleet_and_engines() -> None:
    slow = fleet(7, link=500_000, command=400, engine=Form.ZSTD)
    fast = fleet(8, link=10_000_000, command=160)
    other = [
        replace(layer, base_repository="other/1", target_repository="other/2")
        for layer in fleet(9, link=2_000_000, command=1000)
    ]
    downloads, clock = _Downloads([*slow, *fast]), Clock()
    with real_threads() as threads:
        estimates = DeviceEstimates(downloads, threads, clock)
        known = await estimates.of("app/2", "app/3")
        assert known[Form.ZSTD].link == pytest.approx(500_000, rel=0.25)
        assert known[Form.GZIP].link == pytest.approx(10_000_000, rel=0.25)
        assert await estimates.of("other/2", "other/3") == {}
        for number in range(2 * len(downloads.layers) + 9):  # a look-up changes no estimate
            assert await estimates.of(f"strange/{number}", f"strange/{number}/next") == {}
            await estimates.of("app/2", f"app/{number + 3}")
        assert await estimates.of("app/2", "app/3") == known
        downloads.layers = [*slow, *fast, *other]
        assert await estimates.of("other/2", "other/3") == {}  # not looked up for each build
        clock.advance(KEPT_SECONDS)
        learned = await estimates.of("other/2", "other/3")
        assert learned[Form.GZIP].command == pytest.approx(1000, rel=0.25)
        shown = await estimates.fleets()
        assert {(one.repository, one.engine) for one in shown} == {
            ("app/2", Form.ZSTD),
            ("app/2", Form.GZIP),
            ("other/2", Form.GZIP),
        }
        counts = [one.estimate.devices for one in shown]
        assert counts == sorted(counts, reverse=True)


class _NoDownloads(_Downloads):
    async def all(self) -> list[MeasuredLayer]:
        raise Unavailable("catalogue: it is busy")


@pytest_twisted.ensureDeferred
async def test_prices_follow_the_setting_or_the_estimates() -> None:
    fast = fleet(7, link=10_000_000, command=400, engine=Form.ZSTD)
    slow = fleet(8, link=500_000, command=160, devices=60)
    both = (Form.GZIP, Form.ZSTD)
    with real_threads() as threads:

        async def prices(
            link: float | None, layers: list[MeasuredLayer], forms: Sequence[Form] = both
        ) -> dict[Form, float]:
            learned = DeviceEstimates(_Downloads(layers), threads, Clock())
            return await CommandPrices(link, learned, forms).of("app/2", "app/3")

        assert await prices(2e6, [*fast, *slow]) == command_prices(2e6)
        assert set((await prices(0.0, fast)).values()) == {0.0}
        assert await prices(None, []) == DEFAULT_PRICES
        learned = await prices(None, [*fast, *slow])
        assert learned[Form.ZSTD] == pytest.approx(400 * 10 / 8 / 2, rel=0.3)
        assert learned[Form.GZIP] == pytest.approx(160 * 0.5 / 8 / 2, rel=0.3)
        only_new = await prices(None, fast)
        assert only_new == {**DEFAULT_PRICES, Form.ZSTD: learned[Form.ZSTD]}
        # If only gzip is built, the engines of most devices count.
        assert (await prices(None, [*fast, *slow], [Form.GZIP]))[Form.GZIP] == learned[Form.ZSTD]
        away = CommandPrices(None, DeviceEstimates(_NoDownloads([]), threads, Clock()), both)
        assert await away.of("app/2", "app/3") == DEFAULT_PRICES


@pytest.mark.parametrize(
    ("delta", "command_bytes", "worth"),
    [
        (900, 0, True),
        (901, 0, False),  # only bytes count
        (500, 10_000, True),  # it saves more than the share
        (950, 50, True),  # it takes no longer
        (950, 50.1, False),
        (1001, 0.1, False),
    ],
)
def test_a_delta_is_not_worth_it_if_it_saves_little_and_takes_longer(
    delta: int, command_bytes: float, worth: bool
) -> None:
    if worth:
        check_delta_size(delta, 1000, 0.9, command_bytes)
        return
    with pytest.raises(DeltaTooLarge):
        check_delta_size(delta, 1000, 0.9, command_bytes)
