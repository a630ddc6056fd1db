"""The benchmark's commonest releases: each kind makes its change, and no delta is larger than
rdiff's.
"""

from __future__ import annotations

import pytest

from bench import releases
from bench.layers import directory, file


@pytest.mark.parametrize("number", range(len(releases.KINDS)))
def test_each_kind_of_release_makes_its_change(number: int) -> None:
    lines = [
        b"".join(b"line %d of file %d\n" % (line, at) for line in range(300)) for at in range(40)
    ]
    layers = [
        [
            directory(f"d{at // 10}", mtime=releases.BEFORE)
            if at % 10 == 0
            else file(f"d{at // 10}/{at}.py", lines[at])
            for at in range(40)
        ]
        for _ in range(2)
    ]
    layers[0] = layers[0][:30]
    name, kind, change = releases.KINDS[number]
    result = releases.measure(layers, change, name, kind)
    assert result.full > 0
    assert max(result.ours.values()) <= result.rdiff + 60
    assert name in releases.line(result)
