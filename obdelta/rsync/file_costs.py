"""Which files made a batch big: its records, which have no names, and rsync's words, which have no
sizes in the batch.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Any

from obdelta.oci import shown
from obdelta.rsync.batch import Sent
from obdelta.rsync.file_records import Transfer, Transfers

TOP = 20
"""Files that are told of one by one."""


class Shares:
    """Brings both together, which come in the same order, and keeps the largest. Words may come
    from another thread.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._words: deque[Sent] = deque()
        self._odds = False
        self._number = 0
        self._largest: list[tuple[int, int, Transfer, Sent]] = []
        self._files = self._wire_bytes = self._size = self._copied_bytes = self._copies = 0

    def sent(self, sent: Sent) -> None:
        """rsync's next word."""
        self._words.append(sent)

    def join(self) -> None:
        """Counts what is there of both. From one thread."""
        found = self._transfers.found
        while found and self._words:
            self._count(found.popleft(), self._words.popleft())

    def _count(self, transfer: Transfer, sent: Sent) -> None:
        if not transfer.sent:
            return
        if transfer.copied_bytes > sent.size:
            self._odds = True
        self._files += 1
        self._wire_bytes += transfer.wire_bytes
        self._size += sent.size
        self._copied_bytes += transfer.copied_bytes
        self._copies += transfer.copies
        self._number -= 1  # of two that are as large, the first one stays
        heapq.heappush(self._largest, (transfer.wire_bytes, self._number, transfer, sent))
        if len(self._largest) > TOP:
            heapq.heappop(self._largest)

    def told(self) -> dict[str, Any] | None:
        """All of it when both have ended, as JSON; None where they are at odds.

        ``files`` whose content was sent, their ``size`` in the target's tree, ``wire_bytes`` in the
        batch, ``copied_bytes`` of the base's files with the same names in ``copies`` runs; ``top``:
        the same of the largest in the batch, by ``name``.
        """
        self.join()
        if self._odds or self._transfers.unreadable or self._transfers.found or self._words:
            return None
        return {
            "files": self._files,
            "size": self._size,
            "wire_bytes": self._wire_bytes,
            "copied_bytes": self._copied_bytes,
            "copies": self._copies,
            "top": [
                {
                    "name": shown(sent.name),
                    "size": sent.size,
                    "wire_bytes": transfer.wire_bytes,
                    "copied_bytes": transfer.copied_bytes,
                    "copies": transfer.copies,
                }
                for _, _, transfer, sent in sorted(self._largest, reverse=True)
            ],
        }
