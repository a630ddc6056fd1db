"""Items in one line for each key (a subject, an address), so that the longest line gives way."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Lines(Generic[Item]):
    """Items by key, in the order of their arrival. Every operation takes constant time."""

    def __init__(self) -> None:
        self._key_of: dict[Item, str] = {}
        self._lines: dict[str, dict[Item, None]] = {}
        self._by_length: dict[int, dict[str, None]] = {}
        self._longest = 0

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, item: Item) -> bool:
        return item in self._key_of

    def items(self) -> list[Item]:
        """Returns all items, the oldest first."""
        return list(self._key_of)

    def add(self, key: str, item: Item) -> None:
        """Puts a new item at the end of its key's line."""
        self._key_of[item] = key
        line = self._lines.setdefault(key, {})
        line[item] = None
        self._resized(key, len(line) - 1, len(line))

    def remove(self, item: Item) -> None:
        """Removes an item; does nothing where it is in no line."""
        key = self._key_of.pop(item, None)
        if key is None:
            return
        line = self._lines[key]
        del line[item]
        self._resized(key, len(line) + 1, len(line))
        if not line:
            del self._lines[key]

    def length(self, key: str) -> int:
        """Returns how many items the key has."""
        return len(self._lines.get(key, ()))

    def oldest(self, key: str) -> Item:
        """Returns the first item of a line that has any."""
        return next(iter(self._lines[key]))

    def oldest_of_longest(self) -> Item:
        """Returns the first item of the longest line. Raises KeyError where there is none."""
        return self.oldest(next(iter(self._by_length[self._longest])))

    def _resized(self, key: str, before: int, after: int) -> None:
        if before:
            keys = self._by_length[before]
            del keys[key]
            if not keys:
                del self._by_length[before]
        if after:
            self._by_length.setdefault(after, {})[key] = None
        if after > self._longest or self._longest not in self._by_length:
            self._longest = after
