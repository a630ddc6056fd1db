"""Files that are read again: which changes are noticed, and how often the file is checked."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.internet.task import Clock

from obdelta.concurrency.watched_file import LOOK_EVERY, WatchedFiles


def test_each_change_of_any_file_is_seen_once(tmp_path: Path) -> None:
    clock, paths = Clock(), [tmp_path / "certificate", tmp_path / "key"]
    for path in paths:
        path.write_text("1")
    watched = WatchedFiles(paths, clock.seconds)
    seen = []
    for step in ("nothing", "content", "nothing", "replaced", "removed", "nothing", "back"):
        match step:
            case "content":
                paths[1].write_text("12")
            case "replaced":
                (tmp_path / "new").write_text("1")
                os.utime(tmp_path / "new", ns=(0, paths[0].stat().st_mtime_ns))
                (tmp_path / "new").rename(paths[0])
            case "removed":
                paths[0].unlink()
            case "back":
                paths[0].write_text("1")
        clock.advance(LOOK_EVERY)
        seen.append(watched.changed())
    assert seen == [False, True, False, True, True, False, True]


def test_another_mode_is_a_change(tmp_path: Path) -> None:
    """A file that became unreadable, or readable again, keeps its content and its time."""
    clock, path = Clock(), tmp_path / "key"
    path.write_text("1")
    watched = WatchedFiles([path], clock.seconds)
    path.chmod(0)
    clock.advance(LOOK_EVERY)
    assert watched.changed() is True
    clock.advance(LOOK_EVERY)
    assert watched.changed() is False


def test_the_file_is_checked_once_a_second_and_known_content_is_no_change(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "key"
    watched = WatchedFiles([path], clock.seconds)
    path.write_text("1")
    clock.advance(LOOK_EVERY / 2)
    assert watched.changed() is False
    watched.mark()
    clock.advance(LOOK_EVERY)
    assert watched.changed() is False
    path.write_text("12")
    assert watched.changed() is False
    clock.advance(LOOK_EVERY)
    assert watched.changed() is True
