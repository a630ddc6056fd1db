"""Pins: counts how often a name is in use, so that it is not removed. Safe between threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Generic, Self, TypeVar

K = TypeVar("K", bound=Hashable)


class _Use(ABC):
    """Something in use until it is released. A context manager; releasing twice counts once."""

    __slots__ = ()

    @abstractmethod
    def release(self) -> None:
        """Ends the use."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Pin(_Use):
    """One use of a name."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


class Pinned(_Use):
    """Something in use, which stays in place until it is released."""

    __slots__ = ()
    pin: Pin

    def release(self) -> None:
        self.pin.release()


class Pins(Generic[K]):
    """Counts the uses of each name. A pinned name is not removed: :meth:`unless_pinned` excludes
    :meth:`pin`.
    """

    def __init__(self) -> None:
        self._uses: Counter[K] = Counter()
        self._lock = threading.Lock()

    def pin(self, name: K) -> Pin:
        """Protects a name until the pin is released. Pin first, then check whether it exists."""
        with self._lock:
            self._uses[name] += 1
        return Pin(lambda: self._unpin(name))

    def _unpin(self, name: K) -> None:
        with self._lock:
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._uses[name]

    def __contains__(self, name: K) -> bool:
        with self._lock:
            return name in self._uses

    def unless_pinned(self, name: K, remove: Callable[[], None]) -> bool:
        """Calls ``remove`` while no caller can pin the name. Returns False, without a call, if it
        is pinned.
        """
        with self._lock:
            if name in self._uses:
                return False
            remove()
            return True
