"""Queues by key, compared with lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdelta.web.devices.retries import Lines

STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans()), max_size=60)


@given(STEPS)
def test_lines_behave_as_one_list_for_each_key(steps: list[tuple[str, int, bool]]) -> None:
    lines: Lines[tuple[str, int]] = Lines()
    kept: list[tuple[str, int]] = []
    for key, number, enters in steps:
        item = (key, number)
        if enters and item not in kept:
            lines.add(key, item)
            kept.append(item)
        elif not enters:
            lines.remove(item)
            if item in kept:
                kept.remove(item)
        assert lines.items() == kept and len(lines) == len(kept)
        of_key = {name: [one for one in kept if one[0] == name] for name in "abc"}
        for name, line in of_key.items():
            assert lines.length(name) == len(line)
            assert not line or lines.oldest(name) == line[0]
        if kept:
            found = lines.oldest_of_longest()
            assert found in lines and found == of_key[found[0]][0]
            assert len(of_key[found[0]]) == max(map(len, of_key.values()))
        else:
            assert not lines._lines and not lines._by_length
            with pytest.raises(KeyError):
                lines.oldest_of_longest()
