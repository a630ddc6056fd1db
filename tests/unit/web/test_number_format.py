"""Sizes, rates, durations and ages as text."""

from __future__ import annotations

import pytest

from obdelta.web.operators.pages import number_format


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (999_600, "1.00 MB"),
        (123_456_789, "123 MB"),
        (5e18, "5000 PB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_sizes_are_formatted(value: float, text: str) -> None:
    assert number_format.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64_000, "64 kbit/s"),
        (990_000, "990 kbit/s"),
        (1_800_000, "1.8 Mbit/s"),
        (9_900_000, "9.9 Mbit/s"),
        (12_000_000, "12 Mbit/s"),
        (100_000_000, "100 Mbit/s"),
    ],
)
def test_bit_rates_are_formatted(value: float, text: str) -> None:
    assert number_format.bit_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0123, "0.012 s"),
        (2.345, "2.3 s"),
        (59.7, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (90_000, "1 d 1 h"),
        (-1, "0 s"),
    ],
)
def test_durations_are_formatted(value: float, text: str) -> None:
    assert number_format.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "just now"),
        (59, "just now"),
        (119, "1 min ago"),
        (7300, "2 h ago"),
        (200_000, "2 d ago"),
    ],
)
def test_ages_are_formatted(value: float, text: str) -> None:
    assert number_format.ago(value) == text
