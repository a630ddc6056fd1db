"""The parser of the command line: suggestions for mistakes, and help texts of one screen."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from obdelta.errors import ObdeltaError
from obdelta.settings import Setting, parsers
from obdelta.settings import address_parsers as addresses

_METAVARS: Final[Mapping[Callable[[str], Any], str]] = {
    parsers.size: "SIZE",
    parsers.duration: "TIME",
    parsers.pull_grace: "TIME",
    parsers.count: "N",
    parsers.limit: "N",
    parsers.share: "RATIO",
    parsers.path: "PATH",
    parsers.paths: "PATHS",
    parsers.path_or_pem: "FILE",
    parsers.yes_no: "yes|no",
    parsers.docker_yes: "yes|no",
    parsers.link: "SPEED",
    parsers.log_levels: "LEVELS",
    parsers.algorithms: "ALGORITHMS",
    parsers.words: "WORDS",
    parsers.word: "WORD",
    parsers.lines: "ENDPOINTS",
    addresses.url: "URL",
    addresses.upstream: "URL",
    addresses.realm: "URL",
    addresses.redis_url: "URL",
    addresses.docker_host: "URL",
    addresses.url_host: "HOST",
    addresses.host: "HOST",
    addresses.hosts: "HOSTS",
    addresses.trusted_networks: "NETWORKS",
    addresses.hosts_and_networks: "HOSTS",
}
_NO_DEFAULT: Final = ("none", "")
_LINK: Final = re.compile(r"\[([^]]*)\]\([^)]*\)")
"""A link of Markdown; its text is kept."""


class WrongUsage(ObdeltaError):
    """The command line contradicts itself, or an option's value cannot be used."""


class Parser(argparse.ArgumentParser):
    """Raises WrongUsage for a command line that it cannot read, with the nearest name."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["formatter_class"] = HelpFormatter
        super().__init__(*arguments, **options)
        self._given: list[str] = []

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the parsed command line. Raises WrongUsage."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser: Parser = getattr(parsed, "parser", self)
            parser.error(parser.unknown(unknown))
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the parsed command line, and arguments that no option takes."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def unknown(self, arguments: Sequence[str]) -> str:
        """Returns what is wrong with arguments that no option takes."""
        given = arguments[0]
        if not given.startswith("-"):
            return f"unexpected argument {given!a}: there are too many"
        options = [
            name
            for name, action in self._option_string_actions.items()
            if action.help is not argparse.SUPPRESS
        ]
        return f"unknown option {given.partition('=')[0]}{nearest(given, options)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {value}{nearest(str(value), names)}")
        raise argparse.ArgumentError(
            action, f"{value!a} cannot be used: the choices are {', '.join(names)}"
        )

    def error(self, message: str) -> NoReturn:
        """Raises WrongUsage. An unknown option is the reason if its value is what is missing."""
        if message.startswith("the following arguments are required"):
            options = [each for each in self._given if re.match(r"--?[a-z]", each)]
            unknown = [each for each in options if not self._knows(each)]
            message = self.unknown(unknown) if unknown else message
        raise WrongUsage(f"{message} (see: {self.prog} --help)")

    def _knows(self, text: str) -> bool:
        name = text.partition("=")[0]
        return name in self._option_string_actions or bool(self._get_option_tuples(text))

    def commands(self) -> argparse._SubParsersAction[Parser]:
        """Returns the action whose choices are the parsers of the commands."""
        (found,) = (
            action for action in self._actions if isinstance(action, argparse._SubParsersAction)
        )
        return found


def nearest(given: str, names: Iterable[str]) -> str:
    """Returns a question that suggests the nearest name, "" if no name is near."""
    found = difflib.get_close_matches(given.partition("=")[0], names, n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ""


class SettingOption(argparse._StoreAction):
    """An option that overrides a setting. Only ``--help-settings`` lists it."""


class SettingsHelp(argparse.Action):
    """``--help-settings``: prints the options that are settings, and ends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options |= {"nargs": 0, "default": argparse.SUPPRESS}
        super().__init__(*arguments, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        """Prints the help."""
        formatter = HelpFormatter(parser.prog)
        formatter.start_section("settings, each also in the file and the environment")
        for action in parser._actions:
            if isinstance(action, SettingOption) and action.help is not argparse.SUPPRESS:
                formatter.add_setting(action)
        formatter.end_section()
        parser._print_message(formatter.format_help(), sys.stdout)
        parser.exit()


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width, keeps examples, and leaves settings out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Returns an option's names with its value once: ``-c, --config FILE``."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _format_action(self, action: argparse.Action) -> str:
        """Returns an action's lines; of the commands, only theirs."""
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, self._iter_indented_subactions(action)))
        return super()._format_action(action)

    def _iter_indented_subactions(
        self, action: argparse.Action
    ) -> Generator[argparse.Action, None, None]:
        if isinstance(action, argparse._SubParsersAction):
            yield from action._get_subactions()

    def add_argument(self, action: argparse.Action) -> None:
        """Adds an option's help, unless it is a setting."""
        if not isinstance(action, SettingOption):
            super().add_argument(action)

    def add_setting(self, action: SettingOption) -> None:
        """Adds a setting's help."""
        super().add_argument(action)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        """Adds the usage line with what is required; options are listed below it."""
        shown = [action for action in actions if action.required or not action.option_strings]
        if usage is None and any(action.option_strings for action in actions):
            words = self._format_usage(None, shown, (), "").split()
            usage = " ".join([words[0] if words else "%(prog)s", *words[1:]])
            usage = usage.replace(self._prog, f"{self._prog} [OPTION…]", 1).replace("%", "%%")
        super().add_usage(usage, shown, (), prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join(
            "\n".join(indent + line for line in block.splitlines())
            if re.search(r"^  ", block, re.MULTILINE)
            else textwrap.fill(
                " ".join(block.split()), width, initial_indent=indent, subsequent_indent=indent
            )
            for block in blocks
        )


def metavar_of(row: Setting) -> str:
    """Returns what a setting's value is: ``SIZE``, ``URL``, or its choices."""
    allowed = inspect.getclosurevars(row.parse).nonlocals.get("allowed")
    if allowed:
        return "|".join(allowed)
    return _METAVARS.get(row.parse, "VALUE")


def help_of(row: Setting) -> str:
    """Returns a setting's meaning and default, for argparse."""
    meaning, default = (
        _LINK.sub(r"\1", text).replace("`", "") for text in (row.help, row.default_help)
    )
    shown = meaning if default in _NO_DEFAULT else f"{meaning} (default: {default})"
    return shown.replace("%", "%%")


# -- values of options -----------------------------------------------------------------------


def number(minimum: int, maximum: int = 1_000_000) -> Callable[[str], int]:
    """Returns the parser of a whole number in this range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"{text!a} is no number from {minimum} to {maximum:,}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Parses a duration: ``90``, ``90 s``, ``15 min``."""
    try:
        return parsers.duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!a} is no duration, such as 90 s or 15 min"
        ) from error


def size(text: str) -> int:
    """Parses bytes. A number without a unit must be 0, or so large that bytes are meant."""
    try:
        found = parsers.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is no size, such as 20 MiB") from error
    if text.isdecimal() and 0 < found < 1_000_000:
        raise argparse.ArgumentTypeError(
            f"{text} has no unit: write {text} MiB, or {text} B for bytes"
        )
    return found
