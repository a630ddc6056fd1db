"""``obdelta check``: one verified update against any delta server, and its figures."""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from obdelta.cli.commands.setup.token import described
from obdelta.cli.options import OK, UNSATISFIED, Commands, add_form, add_json, read_secret
from obdelta.cli.parser import seconds
from obdelta.cli.terminal import Line
from obdelta.errors import BadRequest
from obdelta.oci.reference import Reference

if TYPE_CHECKING:
    from obdelta.device.update import Device, Update


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "check",
        check,
        "run one update as a device does, and verify the result",
        "Requests a delta by API v3 as a supervisor does, pulls it as an engine does, "
        "applies every layer and compares\n"
        "all diff_ids with the target's. Works with any server that supports API v3, "
        "also open-balena-delta.",
        [
            "obdelta check SRC DEST --server https://delta.example.com --token @token"
            " --require-delta"
        ],
    )
    parser.add_argument(
        "source", metavar="SRC", help="the image that the device runs, as devices name it"
    )
    parser.add_argument("target", metavar="DEST", help="the image to update to")
    add_device(parser, required=True)
    add_form(parser, "act as an engine that reads it at best (default: the engine is not named)")
    parser.add_argument(
        "--require-delta", action="store_true", help="exit with 3 when the answer is a full pull"
    )
    add_json(parser)


def add_device(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the options of a device: its delta server, its token, and its registry."""
    parser.add_argument(
        "--server",
        metavar="URL",
        required=required,
        help="the delta server, as devices reach it",
    )
    parser.add_argument(
        "--token",
        metavar="@FILE",
        help="a file with the device's token; - is stdin",
    )
    parser.add_argument(
        "--registry",
        metavar="URL",
        help="the registry to pull every image from",
    )
    parser.add_argument(
        "--ca",
        metavar="FILE",
        type=Path,
        help="PEM authorities of server and registry",
    )
    parser.add_argument(
        "--platform",
        metavar="OS/ARCH",
        help="the device's platform, for an index",
    )
    parser.add_argument(
        "--wait",
        metavar="TIME",
        type=seconds,
        default=900.0,
        help="time to wait for the delta (15 min)",
    )


def device(parsed: argparse.Namespace, line: Line, token: str | None) -> Device:
    """Returns the device that the options describe, with its token. Raises BadRequest if an
    image could not be pulled by its name.
    """
    from obdelta.device.http import Http
    from obdelta.device.update import device_for
    from obdelta.oci import Form

    for name in (parsed.source, parsed.target):
        _check_named(name, parsed.registry)
    return device_for(
        Form(parsed.form) if parsed.form is not None else None,
        parsed.server,
        token,
        registry=parsed.registry,
        platform=parsed.platform,
        http=Http(tls=_tls(parsed.ca)),
        step=line.show,
    )


def check(parsed: argparse.Namespace) -> int:
    """Runs the update and prints it. Raises the error that kept it from being verified."""
    from obdelta.device.http import ServerFault

    with tempfile.TemporaryDirectory(prefix="obdelta-") as work, Line(sys.stderr) as line:
        token = device_token(parsed.token)
        client = device(parsed, line, token)
        try:
            base = client.load_base(Reference.parse(parsed.source), Path(work))
            update = client.update(
                base, parsed.source, parsed.target, Path(work), deadline=parsed.wait
            )
        except ServerFault as error:
            refused = token is not None and error.status in (401, 403)
            more = described(token or "", time.time()) if refused else _remedy(error.status)
            why = f"{error.why}: {more}" if more else error.why
            raise ServerFault(error.what, why, status=error.status) from error
    print(as_json(update) if parsed.json else as_text(update))
    return UNSATISFIED if parsed.require_delta and not update.is_delta else OK


def as_text(update: Update) -> str:
    """Returns the figures as text."""
    what = "delta" if update.is_delta else "full pull (the server has no delta)"
    return (
        f"verified: {what} {update.name}\nimage ID       {update.image_id}\nfull update   "
        f" {update.full_bytes:>15,} bytes\npulled         {update.pulled_bytes:>15,} bytes"
        f" ({update.saving:.1%} saved, {update.layers} layers)\nrequested     "
        f" {update.request_seconds:>15.2f} s ({update.requests} times)\npulled in     "
        f" {update.pulling_seconds:>15.2f} s\npatched in     {update.patching_seconds:>15.2f} s"
    )


def as_json(update: Update) -> str:
    """Returns the figures as one line of JSON."""
    figures = asdict(update)
    figures["asked"] = figures.pop("requests")
    figures["asking_seconds"] = figures.pop("request_seconds")
    return json.dumps(
        figures
        | {
            "image_id": str(update.image_id),
            "saving": update.saving,
            "verified": True,
        }
    )


def _remedy(status: int | None) -> str:
    """Returns what to do about an answer's status, or about none; "" if the answer says it."""
    if status is None:
        return "check that it runs, the URLs of --server and --registry, and --ca"
    if status in (401, 403):
        return "give the device's token (--token @FILE)"
    if status == 404:
        return "check the names of the images, and that --server is an obdelta"
    if status >= 500 or status == 429:
        return "try again, and read the server's page or `obdelta status`"
    return ""


def _check_named(text: str, registry: str | None) -> None:
    if not Reference.parse(text).host and registry is None:
        raise BadRequest(f"image {text} names no host to pull it from; give one, or --registry")


def device_token(text: str | None) -> str | None:
    return read_secret(text, "--token") if text is not None else None


def _tls(bundle: Path | None) -> ssl.SSLContext | None:
    if bundle is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(bundle))
    except ssl.SSLError as error:
        raise BadRequest(
            f"{bundle} has no certificates: give a PEM file with the authorities (--ca)"
        ) from error
