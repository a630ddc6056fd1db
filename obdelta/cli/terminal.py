"""Progress on a terminal: one line that is redrawn. Draws nothing if stderr is no terminal."""

from __future__ import annotations

import enum
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from obdelta.cli.tables import printable

if TYPE_CHECKING:
    from rich.progress import Progress

_BAR = 24


class Volume(enum.Enum):
    """How much commands print on stderr."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_volume = Volume.NORMAL


def use(volume: Volume) -> None:
    """Sets how much this process prints."""
    global _volume
    _volume = volume


def verbose() -> bool:
    """Returns whether each step is printed."""
    return _volume is Volume.VERBOSE


def notice(text: str) -> None:
    """Prints a line on stderr that is no error, unless quiet."""
    if _volume is not Volume.QUIET:
        print(f"obdelta: {text}", file=sys.stderr)


class Line:
    """A line at the bottom of a terminal. Leaving the context clears it.

    Where it draws nothing, a verbose command prints a line for each stage.
    """

    def __init__(self, out: TextIO) -> None:
        drawn = out.isatty() and _volume is not Volume.QUIET
        self._progress = _progress(out) if drawn else None
        self._stage = ""

    def show(self, text: str, share: float | None = None) -> None:
        """Redraws the line. A share from 0 to 1 puts a bar before it."""
        stage = text.partition(" ")[0]
        if self._progress is None:
            if verbose() and stage != self._stage:
                notice(printable(text))
            self._stage = stage
            return
        self._progress.update(
            self._progress.task_ids[0],
            description=printable(text),
            total=None if share is None else 1.0,
            completed=0.0 if share is None else share,
            # Called for every piece of a download, and drawn ten times a second. A short stage
            # could end in between without being displayed.
            refresh=stage != self._stage or share == 1,
        )
        self._stage = stage

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def _progress(out: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    progress = Progress(
        BarColumn(_BAR),
        TaskProgressColumn(),
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
        console=Console(file=out, highlight=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    progress.add_task("", total=None)
    return progress
