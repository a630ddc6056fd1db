"""Commands, their options and exit statuses; what each does is in the modules beside this one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from obdelta import __version__, settings
from obdelta.cli import streams
from obdelta.errors import ObdeltaError, SettingsError
from obdelta.settings import Settings, table

OK, FAILED, USAGE = 0, 1, 2
NO_DELTA = 3
_STATUSES = """exit status:
  0  done (check: the update was verified)
  1  it failed; one line on stderr says why
  2  wrong usage, or a setting that cannot be used
  3  check --require-delta: verified, but the server answered with a full pull"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives back the exit status."""
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except SettingsError as error:
        return _failed(error, USAGE)
    except ObdeltaError as error:
        return _failed(error, FAILED)
    except BrokenPipeError:
        # Whoever read our output has had enough; a second error when Python flushes it is of no use to anybody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _failed(f"{error.filename or 'input or output'}: {error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)


def _failed(why: object, status: int) -> int:
    print(f"obdelta: {' '.join(str(why).split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "obdelta",
        description="Container image deltas for openBalena devices. The server itself is started with twistd: "
        "twistd -n obdelta --config tap.conf",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"obdelta {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_STATUSES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    _add_settings(command("settings", _settings, "print the effective settings and where each came from"))
    _add_diff(command("diff", _diff, "make the librsync delta stream that leads from one layer tar to another"))
    _add_patch(command("patch", _patch, "apply a librsync delta stream to a file"))
    _add_build(command("build", _build, "build one v3 delta image into an OCI image layout"))
    _add_check(command("check", _check, "act as a device against a delta server, and verify what it gives"))
    return parser


# -- settings -----------------------------------------------------------------------------------------------------


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_setting_options(parser)


def _add_setting_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="the settings file (tap.conf)")
    group = parser.add_argument_group("settings")
    for row in table():
        if not row.secret:  # the command line is seen by everybody on the machine
            group.add_argument(f"--{row.key}", metavar="X", help=row.meaning.replace("%", "%%").replace("`", ""))


def _read_settings(parsed: argparse.Namespace, fallbacks: dict[str, str] | None = None) -> Settings:
    options = {row.key: getattr(parsed, row.field) for row in table() if not row.secret}
    file = parsed.config or os.environ.get("OBDELTA_CONFIG")
    return settings.read(options, os.environ, Path(file) if file else None, fallbacks=fallbacks)


def _settings(parsed: argparse.Namespace) -> int:
    found = _read_settings(parsed)
    print("[obdelta]")
    for row in table():
        origin = found.origins[row.key]
        if row.key in found.texts:
            print(f"# {origin}\n{row.key} = " + "\n    ".join(found.texts[row.key].splitlines()))
        else:
            print(f"# {origin}\n#{row.key} =")
    return OK


# -- streams of one layer -----------------------------------------------------------------------------------------


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE_TAR", type=Path, help="the layer that the device has (uncompressed)")
    parser.add_argument("target", metavar="TARGET_TAR", type=Path, help="the layer that it shall have (uncompressed)")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the stream to write; - for stdout")
    _add_effort(parser)


def _add_patch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE_TAR", type=Path, help="the file that the stream copies from")
    parser.add_argument("delta", metavar="DELTA", help="the stream, of `obdelta diff` or `rdiff delta`; - for stdin")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write; - for stdout")


def _add_effort(parser: argparse.ArgumentParser) -> None:
    row = next(row for row in table() if row.key == "effort")
    parser.add_argument("--effort", choices=("fast", "balanced", "small"), default=row.default, help=row.meaning)


def _diff(parsed: argparse.Namespace) -> int:
    streams.diff(parsed.base, parsed.target, parsed.output, parsed.effort)
    return OK


def _patch(parsed: argparse.Namespace) -> int:
    streams.patch_file(parsed.base, parsed.delta, parsed.output)
    return OK


# -- images -------------------------------------------------------------------------------------------------------


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the image that devices run: repository[:tag][@digest]")
    parser.add_argument("target", metavar="DEST", help="the image that they shall run")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="the OCI image layout to put it into"
    )
    _add_setting_options(parser)


def _build(parsed: argparse.Namespace) -> int:
    from obdelta.cli.building import build  # Twisted is loaded for this command only

    # A delta on disk has no public name.
    configured = _read_settings(parsed, {"public-url": "http://localhost"})
    build(configured, parsed.source, parsed.target, parsed.output)
    return OK


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the image that the device runs, as devices name it")
    parser.add_argument("target", metavar="DEST", help="the image that it shall run")
    parser.add_argument("--server", metavar="URL", required=True, help="the delta server")
    parser.add_argument("--token", metavar="T", help="the device's token; @FILE reads it from a file, unseen by others")
    parser.add_argument("--registry", metavar="URL", help="pull every image from here, whatever host is in its name")
    parser.add_argument("--ca", metavar="FILE", type=Path, help="PEM bundle that signs server and registry")
    parser.add_argument("--platform", metavar="OS/ARCH", help="which image of an index the device runs")
    parser.add_argument("--wait", metavar="S", type=float, default=900.0, help="seconds to go on asking (900)")
    parser.add_argument("--require-delta", action="store_true", help="exit with 3 when the answer is a full pull")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _check(parsed: argparse.Namespace) -> int:
    from obdelta.cli.checking import check

    update = check(parsed)
    return NO_DELTA if parsed.require_delta and not update.is_delta else OK
