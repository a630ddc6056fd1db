"""Progress on a terminal: one line that is redrawn. Draws nothing where stderr is no terminal."""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import Self, TextIO

from obdelta.cli.tables import printable

_BAR = 24


class Line:
    """A line at the bottom of a terminal. Leaving the context clears it."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._shown, self._last = out, out.isatty(), ""

    def show(self, text: str, share: float | None = None) -> None:
        """Redraws the line. A share from 0 to 1 puts a bar before it."""
        if not self._shown:
            return
        if share is not None:
            full = round(_BAR * min(max(share, 0.0), 1.0))
            text = f"[{'#' * full}{'.' * (_BAR - full)}] {share:4.0%} {text}"
        text = printable(text)[: shutil.get_terminal_size().columns - 1]
        if text != self._last:  # called for every piece of a download
            self._last = text
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()
