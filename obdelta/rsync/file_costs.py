"""Which files made a batch large: the batch's records give the sizes, rsync's output gives the
names.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Any

from obdelta.oci import printable_name
from obdelta.rsync.batch import ReportedFile
from obdelta.rsync.file_records import Transfer, Transfers

TOP = 20
"""Files that are reported one by one."""


class FileCosts:
    """Joins records and rsync's output, which come in the same order, and keeps the largest files.
    Output may come from another thread.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._sent: deque[ReportedFile] = deque()
        self._disagree = False
        self._number = 0
        self._largest: list[tuple[int, int, Transfer, ReportedFile]] = []
        self._files = self._wire_bytes = self._size = self._copied_bytes = self._copies = 0

    def sent(self, sent: ReportedFile) -> None:
        """Takes the next file of rsync's output."""
        self._sent.append(sent)

    def join(self) -> None:
        """Counts the files that both sides have reported. Called from one thread."""
        found = self._transfers.found
        while found and self._sent:
            self._count(found.popleft(), self._sent.popleft())

    def _count(self, transfer: Transfer, sent: ReportedFile) -> None:
        if not transfer.sent:
            return
        if transfer.copied_bytes > sent.size:
            self._disagree = True
        self._files += 1
        self._wire_bytes += transfer.wire_bytes
        self._size += sent.size
        self._copied_bytes += transfer.copied_bytes
        self._copies += transfer.copies
        self._number -= 1  # of two equally large ones, the first one stays
        heapq.heappush(self._largest, (transfer.wire_bytes, self._number, transfer, sent))
        if len(self._largest) > TOP:
            heapq.heappop(self._largest)

    def totals(self) -> dict[str, Any] | None:
        """Returns the totals as JSON when both sides have ended; None if they disagree.

        ``files`` is the number of files whose content was sent, ``size`` their bytes in the
        target's tree, ``wire_bytes`` those in the batch. ``copied_bytes`` come from the base's
        files with the same names, in ``copies`` runs. ``top`` has the same for the largest in the
        batch, by ``name``.
        """
        self.join()
        if self._disagree or self._transfers.unreadable or self._transfers.found or self._sent:
            return None
        return {
            "files": self._files,
            "size": self._size,
            "wire_bytes": self._wire_bytes,
            "copied_bytes": self._copied_bytes,
            "copies": self._copies,
            "top": [
                {
                    "name": printable_name(sent.name),
                    "size": sent.size,
                    "wire_bytes": transfer.wire_bytes,
                    "copied_bytes": transfer.copied_bytes,
                    "copies": transfer.copies,
                }
                for _, _, transfer, sent in sorted(self._largest, reverse=True)
            ],
        }
