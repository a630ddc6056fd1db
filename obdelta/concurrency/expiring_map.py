"""Two maps with a limit: one forgets the least recently used entry, one forgets expired entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruMap(Generic[K, V]):
    """At most ``most`` entries. The one that was used least recently is forgotten first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> V | None:
        """Returns the value of a key, None if there is none. The key counts as used."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def peek(self, key: K) -> V | None:
        """Returns the value of a key, None if there is none. The key does not count as used."""
        return self._entries.get(key)

    def set(self, key: K, value: V) -> None:
        """Sets the value of a key. The key counts as used."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def pop(self, key: K) -> V | None:
        """Removes a key. Returns its value, None if there was none."""
        return self._entries.pop(key, None)

    def values(self) -> list[V]:
        """Returns all values, the least recently used first."""
        return list(self._entries.values())

    def clear(self) -> None:
        """Removes all keys."""
        self._entries.clear()


class ExpiringMap(Generic[K, V]):
    """At most ``most`` entries, each for the seconds that are given with it.

    The one that was set first is forgotten first. ``seconds`` returns monotonic time.
    """

    def __init__(self, most: int, seconds: Callable[[], float]) -> None:
        self._most, self._seconds = most, seconds
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of entries, exact if all are set for the same time."""
        self._expire()
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def get(self, key: K) -> V | None:
        """Returns the value of a key, None if there is none or it has expired."""
        until, value = self._entries.get(key, (0.0, None))
        return value if value is not None and until > self._seconds() else None

    def set(self, key: K, value: V, life: float) -> None:
        """Sets the value of a key for ``life`` seconds."""
        self._entries[key] = (self._seconds() + life, value)
        self._entries.move_to_end(key)
        self._expire()

    def pop(self, key: K) -> V | None:
        """Removes a key. Returns its value, None if there was none or it had expired."""
        value = self.get(key)
        self._entries.pop(key, None)
        return value

    def _expire(self) -> None:
        now = self._seconds()
        while self._entries and (
            len(self._entries) > self._most or next(iter(self._entries.values()))[0] <= now
        ):
            self._entries.popitem(last=False)
