"""Reads the settings: option, then environment, then file, then derived, then default. Reports keys
that are unknown, missing or unusable.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obdelta.errors import SettingsError, joined
from obdelta.settings.config_file import VARIABLE, ConfigFile, read_file
from obdelta.settings.schema import UNUSED, Settings, all_rows, old_keys, table
from obdelta.settings.setting import PREFIX, DefaultContext, Setting, variable

MASK: Final = "***"
_SERVICE_LINKS: Final = (
    (re.compile(r"_SERVICE_HOST"), re.compile(r"[0-9a-fA-F.:]+")),
    (re.compile(r"_SERVICE_PORT(_[A-Z0-9_]+)?"), re.compile(r"[0-9]{1,5}")),
    (
        re.compile(r"_PORT(_[0-9]{1,5}_(TCP|UDP|SCTP))?"),
        re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+"),
    ),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PROTO"), re.compile(r"tcp|udp|sctp")),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PORT"), re.compile(r"[0-9]{1,5}")),
    (re.compile(r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_ADDR"), re.compile(r"[0-9a-fA-F.:]+")),
)
"""Endings of service links' names, and the form of their values."""
_SECRET_NAME = re.compile(r"token|secret|password|key|credential", re.IGNORECASE)


def read(
    options: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Path | None = None,
    *,
    fallbacks: Mapping[str, str] | None = None,
) -> Settings:
    """Returns the effective settings. Raises SettingsError with every unknown, missing or unusable
    setting.

    ``options`` maps keys (``public-url``) to values of the command line, None if it gave none.
    ``file`` is an INI file with the one section ``[obdelta]``. ``fallbacks`` are the weakest, for
    commands that can do without a required key.
    """
    config = read_file(file) if file is not None else ConfigFile()
    sources = _Sources(options, environment, config)
    errors = [*config.errors, *sources.unknown_names()]
    parsed: dict[str, Any] = {}
    origins: dict[str, str] = {}
    texts: dict[str, str] = {}
    context = DefaultContext(environment, parsed)
    for row in all_rows():
        try:
            found, origins[row.key] = _find(row, sources, context, fallbacks or {})
            parsed[row.field] = _parse(row, found, sources.place(row.key, origins[row.key]))
        except SettingsError as error:
            # A derived value that cannot be used repeats the error of what it follows from.
            if not errors or origins.get(row.key) != "derived":
                errors.append(error)
        except KeyError:
            continue  # its default follows from a setting that cannot be used
        else:
            if found:
                texts[row.key] = MASK if row.secret else found
    own = parsed.get("upstream_credentials") in ("builder", "basic")
    if own and parsed.get("builder_token", "") is None:
        errors.append(
            SettingsError(
                "builder-token", None, next(r.expected for r in table() if r.key == "builder-token")
            )
        )
    if errors:
        raise joined(errors)
    return Settings(**parsed, origins=origins, texts=texts, notices=tuple(_notices(sources)))


def _parse(row: Setting, found: str, place: str) -> Any:
    """Returns a row's value, None for no text. Raises SettingsError."""
    if not found:
        if row.required:
            raise SettingsError(
                row.key, None, f"{row.expected}, as {row.key} in the file or {row.environment[0]}"
            )
        return None
    try:
        return row.parse(found)
    except ValueError:
        displayed = MASK if row.secret else _shortened(found)
        raise SettingsError(
            row.key, displayed, f"{row.expected} (from {place}){_hint(found)}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Sources:
    """The sources of values: options, environment and file."""

    options: Mapping[str, str | None]
    environment: Mapping[str, str]
    config: ConfigFile

    def unknown_names(self) -> Iterator[SettingsError]:
        """Returns an error for each unknown key or variable."""
        known, old = [row.key for row in table()], old_keys()
        for key, value in self.options.items():
            if key not in known and key not in old:
                yield _unknown(key, value or "", known, "option")
        for key, value in self.config.values.items():
            if key not in known and key not in old:
                yield _unknown(key, value, known, self.config.place(key))
        variables = [VARIABLE, *(name for row in table() for name in row.environment)]
        old_variables = {variable(key) for key in old}
        for name, value in self.environment.items():
            if (
                name.startswith(PREFIX)
                and name not in variables
                and name not in old_variables
                and not is_service_link(name, value)
            ):
                yield _unknown(name, value, variables, "environment")

    def find(self, key: str, variables: tuple[str, ...] = ()) -> tuple[str, str]:
        """Returns the strongest text for a key (``""``: none) and its source. ``variables``:
        further variables.
        """
        if found := (self.options.get(key) or "").strip():
            return found, "option"
        for name in (variable(key), *variables):
            if found := self.environment.get(name, "").strip():
                return found, f"environment {name}"
        return self.config.values.get(key, "").strip(), "file"

    def place(self, key: str, origin: str) -> str:
        """Returns a source as error texts name it: a file with the line of the key."""
        if origin != "file":
            return origin
        old = next((row.old_key for row in all_rows() if row.key == key), "")
        return self.config.place(key if key in self.config.values else old)

    def places(self, key: str) -> Iterator[tuple[str, str]]:
        """Returns each place that gives a key: its name there, and the place."""
        if (self.options.get(key) or "").strip():
            yield f"--{key}", "the command line"
        if self.environment.get(variable(key), "").strip():
            yield variable(key), "the environment"
        if self.config.path is not None and self.config.values.get(key, "").strip():
            yield key, self.config.path.name


def _notices(sources: _Sources) -> Iterator[str]:
    """Returns a line for each old key that was given."""
    for row in all_rows():
        for name, place in sources.places(row.old_key) if row.old_key else ():
            new = name.replace(row.old_key, row.key).replace(
                variable(row.old_key), variable(row.key)
            )
            yield f"setting {name} is now {new}: the old name still works: rename it in {place}"
        for name, place in sources.places(row.key) if row.superseded else ():
            yield (
                f"setting {name} is no longer needed: {row.superseded}: its value is still used:"
                f" remove it from {place} unless you depend on it"
            )
    for key, why in UNUSED.items():
        for name, place in sources.places(key):
            yield f"setting {name} is no longer used: {why}: remove it from {place}"


def is_service_link(name: str, value: str) -> bool:
    """Returns whether Kubernetes (or Docker's old links) made the variable for a service named
    "obdelta…".

    Every pod gets such variables, unless ``enableServiceLinks: false`` is set. Name and value must
    both have the shape. Source: Kubernetes, "Accessing Services", environment variables.
    """
    return any(
        shape.fullmatch(value.strip())
        and (end := re.search(f"(?:{ending.pattern})$", name))
        and end.start() > 0
        for ending, shape in _SERVICE_LINKS
    )


def _find(
    row: Setting, sources: _Sources, context: DefaultContext, fallbacks: Mapping[str, str]
) -> tuple[str, str]:
    """Returns the strongest text for a row (``""``: none) and its source."""
    found, origin = sources.find(row.key, row.variables)
    if row.old_key:
        old, old_origin = sources.find(row.old_key)
        if found and old:
            raise SettingsError(
                row.old_key,
                _shortened(old),
                f"only {row.key}, its new name, which is also given"
                f" ({row.old_key} from {old_origin}, {row.key} from {origin})",
            )
        if old:
            return old, old_origin
    if found:
        return found, origin
    if row.derive is not None and (found := row.derive(context) or ""):
        return found, "derived"
    if found := fallbacks.get(row.key, ""):
        return found, "default"
    return row.default or "", "default"


def _unknown(name: str, value: str, known: list[str], where: str) -> SettingsError:
    similar = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    # A typo in a secret's name must not reveal the secret.
    secret = any(_SECRET_NAME.search(each) for each in (name, *similar))
    return SettingsError(
        name, MASK if secret else _shortened(value), f"a known key ({where}){hint}"
    )


def _hint(value: str) -> str:
    """Returns what is probably wrong with a value that cannot be parsed, "" if nothing is known."""
    if value[0] in "\"'" and value[-1] == value[0]:
        return "; write it without quotes"
    if re.search(r"\s[#;]", value):
        return "; a comment needs a line of its own"
    return ""


def _shortened(value: str) -> str:
    return value if len(value) <= 80 else value[:77] + "..."
