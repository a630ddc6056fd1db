"""SIGHUP: reads the settings file, certificates, keys and log levels again while the
server runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.logger import Logger

from obdelta.errors import SettingsError
from obdelta.net.certificates import Certificates
from obdelta.observability.logging import Levels
from obdelta.settings import Settings, table
from obdelta.web.devices.auth import Access, TokenAccess

log = Logger()

LEVEL = "log-level"
"""The only setting whose new value takes effect without a restart. Files of certificates and keys
are read again.
"""


class Reload:
    """Reads again what can be read again, and logs the result.

    ``read`` returns the settings from the same sources as at the start. ``steps`` are called with
    the new log levels; more may be added.
    """

    def __init__(
        self, configured: Settings, read: Callable[[], Settings], levels: Levels | None
    ) -> None:
        self._started, self._read, self._levels = configured, read, levels
        self._log_level = configured.log_level
        self.steps: list[Callable[[Mapping[str, str]], object]] = []

    def __call__(self) -> None:
        """Reloads. Settings that cannot be read leave the levels as they are; files are read again
        in any case.
        """
        try:
            new = self._read()
        except SettingsError as error:
            log.error("reload: the settings stay as they are: {reason}", reason=str(error))
        else:
            before, self._log_level = self._log_level, new.log_level
            if self._levels is not None:
                self._levels.use(new.log_level)
            if new.log_level != before:
                log.info("reload: {key} is {value} now", key=LEVEL, value=new.texts[LEVEL])
            self._report(new)
        for step in self.steps:
            step(self._log_level)
        log.info("reload: done")

    def _report(self, new: Settings) -> None:
        """Logs which settings differ from those of the start."""
        for row in table():
            if row.key != LEVEL and getattr(self._started, row.field) != getattr(new, row.field):
                shown = "(secret)" if row.secret else new.texts.get(row.key, "none")
                log.warn(
                    "reload: {key} = {value} takes effect after a restart", key=row.key, value=shown
                )


def reload_files(
    certificates: Certificates | None, access: Access
) -> Callable[[Mapping[str, str]], None]:
    """Returns the step that reads the files of certificates and keys again."""

    def step(_levels: Mapping[str, str]) -> None:
        if certificates is not None:
            certificates.reload()
        if isinstance(access, TokenAccess):
            access.reload()

    return step
