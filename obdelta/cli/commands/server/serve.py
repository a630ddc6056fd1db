"""``obdelta serve``: the server in the foreground, as ``twistd -n obdelta`` runs it."""

from __future__ import annotations

import argparse
import signal
import sys

from obdelta.cli.options import OK, Commands, add_setting_options, given_settings


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "serve",
        run,
        "run the server in the foreground",
        "The log goes to standard output; Ctrl-C stops the server. `twistd obdelta` takes the same"
        " options\nand is the form for services.",
        ["obdelta serve", "obdelta serve -c tap.conf --log-level debug"],
    )
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Runs twistd with the same options, in this process."""
    return run_twistd(parsed)


def run_twistd(parsed: argparse.Namespace, *flags: str) -> int:
    """Runs ``twistd obdelta`` with the settings of a command line, in this process."""
    from twisted.scripts import twistd

    # The reactor installs its own handlers only over the default ones.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    options = [f"--{key}={value}" for key, value in given_settings(parsed).items()]
    if parsed.config is not None:
        options.append(f"--config={parsed.config}")
    sys.argv[1:] = ["--nodaemon", "--pidfile=", "obdelta", *flags, *options]
    twistd.run()
    return OK
