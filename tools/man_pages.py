"""``python -m tools.man_pages DIR``: writes the manual pages into DIR.

They are made from the parser of the command and the table of settings: ``obdelta.1``, one
``obdelta-COMMAND.1`` for each command, and ``tap.conf.5``. The same version gives the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from obdelta import __version__
from obdelta.cli.main import make_parser
from obdelta.cli.options import STATUSES
from obdelta.cli.parser import Parser, SettingOption, help_of, metavar_of
from obdelta.settings import Setting, table


def commands(parser: Parser) -> dict[str, tuple[str, Parser]]:
    """Returns the summary and the parser of each command."""
    made = parser.commands()
    summaries = {action.dest: action.help or "" for action in made._get_subactions()}
    return {name: (summaries[name], inner) for name, inner in made.choices.items()}


def escaped(text: str) -> str:
    """Returns text in which roff sees no request and no escape."""
    shown = text.replace("\\", r"\e").replace("-", r"\-")
    shown = "".join(char if char.isascii() else rf"\[u{ord(char):04X}]" for char in shown)
    return rf"\&{shown}" if shown.startswith((".", "'")) else shown


def paragraphs(text: str) -> Iterator[str]:
    """Yields the lines of filled paragraphs; indented lines stay as they are."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if re.search(r"^  ", block, re.MULTILINE):
            lines = [escaped(line.removeprefix("  ")) for line in block.splitlines()]
            yield from (".PP", ".nf", ".RS 4", *lines, ".RE", ".fi")
        else:
            yield from (".PP", escaped(" ".join(block.split())))


def option(names: Iterable[str], value: str, meaning: str) -> Iterator[str]:
    """Yields the lines of one option."""
    bold = ", ".join(rf"\fB{escaped(name)}\fR" for name in names)
    yield ".TP"
    yield rf"{bold} \fI{escaped(value)}\fR" if value else bold
    yield escaped(meaning)


def head(name: str, section: int, summary: str) -> Iterator[str]:
    """Yields the first lines of a page."""
    yield f'.TH "{name.upper()}" "{section}" "" "obdelta {__version__}" "obdelta"'
    yield from (".nh", ".ad l")  # names of options and variables stay whole, to be copied
    yield from (".SH NAME", rf"{escaped(name)} \- {escaped(summary)}")


def page(name: str, summary: str, parser: Parser) -> str:
    """Returns the page of one command, or of the whole."""
    prog = parser.prog
    lines = [*head(name, 1, summary), ".SH SYNOPSIS"]
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: ").removeprefix(prog)
    lines.append(rf"\fB{escaped(prog)}\fR {escaped(usage.strip())}")
    lines += [".SH DESCRIPTION", *paragraphs(parser.description or "")]
    given, options = list[str](), list[str]()
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, SettingOption):
            continue
        if isinstance(action, argparse._SubParsersAction):
            continue
        meaning = (action.help or "").replace("%%", "%")
        value = "" if action.nargs == 0 else action.metavar or "|".join(action.choices or ())
        shown = value if isinstance(value, str) else " ".join(value)
        if action.option_strings:
            options += option(action.option_strings, shown, meaning)
        else:
            given += option([shown or action.dest], "", meaning)
    if name == "obdelta":
        for other, (about, _) in commands(parser).items():
            given += option([other], "", f"{about}: see obdelta-{other}(1)")
    title = ".SH COMMANDS" if name == "obdelta" else ".SH ARGUMENTS"
    lines += [title, *given] if given else []
    lines += [".SH OPTIONS", *options]
    if any(isinstance(action, SettingOption) for action in parser._actions):
        lines += [".PP", "Every setting of tap.conf(5) is an option, too."]
    if parser.epilog and "examples:" in parser.epilog:
        lines += [".SH EXAMPLES", *paragraphs(parser.epilog.partition("examples:\n")[2])]
    lines += [".SH EXIT STATUS"]
    for status, meaning in re.findall(r"^  (\d+)  (.*(?:\n     .*)*)", STATUSES, re.MULTILINE):
        lines += option([status], "", " ".join(meaning.split()))
    others = "obdelta(1), " if name != "obdelta" else ""
    lines += [".SH SEE ALSO", f"{others}tap.conf(5), twistd(1)"]
    return "\n".join(lines) + "\n"


def settings_page(rows: Iterable[Setting]) -> str:
    """Returns the page of the settings file."""
    lines = [*head("tap.conf", 5, "settings of obdelta"), ".SH DESCRIPTION"]
    lines += paragraphs(
        "The file has one section, [obdelta], with a line for each setting: key = value. Further"
        " values of a list are on indented lines. A setting is also an option (--key) of twistd"
        " obdelta and of commands, and an environment variable. The option counts before the"
        " variable, and the variable before the file.\n\nThe file is that of --config, of"
        " OBDELTA_CONFIG, ./tap.conf, or /etc/obdelta/tap.conf, the first that there is."
    )
    lines.append(".SH SETTINGS")
    for row in rows:
        meaning = help_of(row).replace("%%", "%")
        lines += option([row.key], f"= {metavar_of(row)}", f"{meaning} [{row.environment[0]}]")
    lines += [".SH SEE ALSO", "obdelta(1), obdelta-settings(1), obdelta-doctor(1)"]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Returns all pages by file name."""
    parser = make_parser()
    made = {"obdelta.1": page("obdelta", "container image deltas for openBalena devices", parser)}
    for name, (summary, inner) in commands(parser).items():
        made[f"obdelta-{name}.1"] = page(f"obdelta-{name}", summary, inner)
    return made | {"tap.conf.5": settings_page(table())}


def main() -> int:
    """Writes the pages."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        (folder / name).write_text(content, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
