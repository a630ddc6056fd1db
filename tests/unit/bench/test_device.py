"""The model of an update's time, and the count of a stream's commands."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from bench.device import commands_of
from bench.device_model import (
    FILE,
    INDEX,
    PROFILES,
    UNPACK,
    Delta,
    Measured,
    Profile,
)
from bench.device_report import goals
from obdelta.delta.build import Effort
from obdelta.delta.effort import COMMAND_MICROSECONDS, OVERLAP, arriving_bytes, command_prices
from obdelta.oci import Form
from tests.support.delta import build
from tests.support.delta_reference import decode


def test_commands_are_counted_in_streams_of_both_programs(tmp_path: Path) -> None:
    rng = random.Random(1)
    base = rng.randbytes(100_000)
    target = b"".join(base[n : n + 3000] + rng.randbytes(n % 700) for n in range(0, 90_000, 3001))
    stream = build([base], target).stream
    assert commands_of(stream) == sum(1 for _ in decode(stream))
    for name, content in (("base", base), ("target", target)):
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in ("base", "signature")]
    subprocess.run(["rdiff", "-b", "512", "-S", "32", "signature", *files], check=True)
    files = [tmp_path / name for name in ("signature", "target", "delta")]
    subprocess.run(["rdiff", "delta", *files], check=True)
    stream = files[2].read_bytes()
    assert commands_of(stream) == sum(1 for _ in decode(stream))


@pytest.mark.parametrize("size", [1000, 10**8], ids=["processor", "link"])
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_the_price_is_what_a_command_costs_in_the_model(
    form: Form, profile: Profile, size: int
) -> None:
    """A command and the bytes of its price take the same time on a device of the assumed speed.

    The shorter of download and work is partly hidden, the longer one is not.
    """
    pair = Measured("x", 10**9, 1 << 20, 100, 100, Delta(1 << 19, 100), {})
    link_bound = size > 1000
    start = pair.seconds(Delta(size, 50), form, profile)
    command = pair.seconds(Delta(size, 51), form, profile) - start
    arriving = arriving_bytes(1, command_prices(profile.link)[form])
    bytes_ = pair.seconds(Delta(size + round(arriving), 50), form, profile) - start
    hidden = OVERLAP if link_bound else 1 / OVERLAP
    assert command == pytest.approx(bytes_ * profile.slowdown / 10 * hidden, rel=1e-4)
    assert pair.best(form, profile) == pair.seconds(pair.engine, form, profile)


def test_a_delta_costs_reads_of_the_base_and_a_full_pull_does_not() -> None:
    """One device, computed by hand: 10 MB and 1000 files on a tenth of the processor, 1 MB at 2
    Mbit/s.
    """
    pair = Measured("x", 10**6, 10 << 20, 1000, 5000, Delta(10**5, 0), {})
    work, download = 10 * (10 * UNPACK + 1000 * FILE), 8 * 10**6 / 2e6
    assert work < download
    full = pair.seconds(Delta(pair.full, 0), Form.GZIP, PROFILES[1])
    assert full == pytest.approx(download + OVERLAP * work)
    delta = pair.seconds(Delta(pair.full, 1), Form.GZIP, PROFILES[1])
    command = COMMAND_MICROSECONDS[Form.GZIP] / 1e6
    assert delta - full == pytest.approx(OVERLAP * 10 * (5000 * INDEX + command))


def test_goals_are_geometric_means() -> None:
    pairs = []
    for factor in (1, 4):
        deltas = {
            f"balanced {form.value} {link}": Delta(factor * 100_000, 10)
            for form in Form
            for link in ("metered", "0.5 Mbit/s", "2 Mbit/s", "10 Mbit/s")
        }
        pairs.append(Measured("x", 10**7, 10**6, 10, 10, Delta(400_000, 1000), deltas))
    found = {what: (zstd, gzip) for what, zstd, gzip in goals(pairs, [Effort.BALANCED])}
    assert found["bytes ÷ engine's own, defaults"] == (
        "0.500 (≤ 0.45: missed)",
        "0.500 (≤ 0.5: met)",
    )
    assert len(found) == 5
