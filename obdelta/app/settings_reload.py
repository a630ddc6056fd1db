"""SIGHUP and ``obdelta reload``: read the settings file, certificates, keys and log levels again
while the server runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from twisted.logger import Logger

from obdelta.app.access import Ingress
from obdelta.errors import SettingsError
from obdelta.observability.logging import Levels
from obdelta.settings import Settings, all_rows
from obdelta.web.devices.access.admission import TokenAccess

log = Logger()

LEVEL = "log-level"
"""The only setting whose new value takes effect without a restart. Files of certificates and keys
are read again.
"""


@dataclass(slots=True)
class ReloadReport:
    """The result of a reload: one line for each change that was taken, for each that needs a
    restart, and for each part that stays as it was because its new content is unusable.
    """

    taken: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, problems: list[str]) -> None:
        """Adds the problems of reading files again; without one, what was taken."""
        self.problems += problems
        if not problems:
            self.taken.append(what)


Step = Callable[[Mapping[str, str], ReloadReport], object]
"""A step of a reload. It gets the new log levels, and adds its results to the report."""


class Reload:
    """Reads again what can be read again, logs the result, and returns it.

    ``read`` returns the settings from the same sources as at the start. More ``steps`` may be
    added.
    """

    def __init__(
        self, configured: Settings, read: Callable[[], Settings], levels: Levels | None
    ) -> None:
        self._started, self._read, self._levels = configured, read, levels
        self._log_level = configured.log_level
        self.steps: list[Step] = []

    def __call__(self) -> ReloadReport:
        """Reloads. Settings that cannot be read leave the levels as they are; files are read again
        in any case.
        """
        report = ReloadReport()
        try:
            new = self._read()
        except SettingsError as error:
            log.error("reload: the settings stay as they are: {reason}", reason=str(error))
            report.problems += [str(each) for each in error.each]
        else:
            before, self._log_level = self._log_level, new.log_level
            if self._levels is not None:
                self._levels.use(new.log_level)
            if new.log_level != before:
                log.info("reload: {key} is {value} now", key=LEVEL, value=new.texts[LEVEL])
                report.taken.append(f"{LEVEL} = {new.texts[LEVEL]}")
            self._compare(new, report)
        for step in self.steps:
            step(self._log_level, report)
        log.info("reload: done")
        return report

    def _compare(self, new: Settings, report: ReloadReport) -> None:
        """Reports which settings differ from those of the start, and which old keys were added."""
        for notice in new.notices:
            if notice not in self._started.notices:
                log.warn("{notice}", notice=notice)
        for row in all_rows():
            if row.key != LEVEL and getattr(self._started, row.field) != getattr(new, row.field):
                shown = "(secret)" if row.secret else new.texts.get(row.key, "none")
                log.warn(
                    "reload: {key} = {value} takes effect after a restart", key=row.key, value=shown
                )
                report.restart.append(f"{row.key} = {shown}")


def reload_files(ingress: Ingress) -> Step:
    """Returns the step that reads the files of certificates and keys again."""
    certificates, access = ingress.certificates, ingress.access

    def step(_levels: Mapping[str, str], report: ReloadReport) -> None:
        if certificates is not None:
            report.add("certificates of tls-certificate", certificates.reload())
        if isinstance(access, TokenAccess):
            report.add("keys of auth-key", access.reload())

    return step
