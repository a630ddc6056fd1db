"""``obdelta check``: one verified update against any delta server, and its figures."""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from obdelta.cli.options import FOUND_WANTING, OK, Commands, add_json, secret_in
from obdelta.cli.terminal import Line
from obdelta.errors import BadRequest
from obdelta.oci.reference import Reference

if TYPE_CHECKING:
    from obdelta.device import Device, Update


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "check",
        check,
        "act as a device against a delta server, and verify what it gives",
        "Asks the server's API v3 as a supervisor does, pulls the answer as an engine does, patches"
        " every layer and compares\nall diff_ids with the target's. Works against any server that"
        " speaks API v3, also open-balena-delta.",
        [
            "obdelta check SRC DEST --server https://delta.example.com --token @token"
            " --require-delta"
        ],
    )
    parser.add_argument(
        "source", metavar="SRC", help="the image that the device runs, as devices name it"
    )
    parser.add_argument("target", metavar="DEST", help="the image that it shall run")
    add_device(parser, required=True)
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
        help="the delta server, asked as a device asks it",
    )
    parser.add_argument(
        "--token",
        metavar="T",
        help="the device's token; @FILE reads it from a file, unseen by others",
    )
    parser.add_argument(
        "--registry", metavar="URL", help="pull every image from here, whatever host is in its name"
    )
    parser.add_argument(
        "--ca", metavar="FILE", type=Path, help="PEM bundle that signs server and registry"
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="which image of an index the device runs"
    )
    parser.add_argument(
        "--wait", metavar="S", type=float, default=900.0, help="seconds to go on asking (900)"
    )


def device(parsed: argparse.Namespace, line: Line) -> Device:
    """Returns the device that the options describe. Raises BadRequest where an image could not be
    pulled by its name.
    """
    from obdelta.device import Device, Engine, Http

    for name in (parsed.source, parsed.target):
        _check_named(name, parsed.registry)
    token = _token(parsed.token)
    http = Http(tls=_tls(parsed.ca))
    return Device(
        http,
        Engine(http, token, parsed.registry, parsed.platform),
        parsed.server,
        token,
        step=line.show,
    )


def check(parsed: argparse.Namespace) -> int:
    """Runs the update and prints it. Raises the error that kept it from being verified."""
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work, Line(sys.stderr) as line:
        client = device(parsed, line)
        base = client.load_base(Reference.parse(parsed.source), Path(work))
        update = client.update(base, parsed.source, parsed.target, Path(work), deadline=parsed.wait)
    print(as_json(update) if parsed.json else as_text(update))
    return FOUND_WANTING if parsed.require_delta and not update.is_delta else OK


def as_text(update: Update) -> str:
    """Returns the figures as text."""
    what = "delta" if update.is_delta else "full pull (the server gave no delta)"
    return (
        f"verified: {what} {update.name}\nimage ID       {update.image_id}\nfull update   "
        f" {update.full_bytes:>15,} bytes\npulled         {update.pulled_bytes:>15,} bytes"
        f" ({update.saving:.1%} saved, {update.layers} layers)\nasked         "
        f" {update.asking_seconds:>15.2f} s ({update.asked} times)\npulled in     "
        f" {update.pulling_seconds:>15.2f} s\npatched in     {update.patching_seconds:>15.2f} s"
    )


def as_json(update: Update) -> str:
    """Returns the figures as one line of JSON."""
    return json.dumps(
        asdict(update)
        | {
            "image_id": str(update.image_id),
            "saving": update.saving,
            "verified": True,
        }
    )


def _check_named(text: str, registry: str | None) -> None:
    if not Reference.parse(text).host and registry is None:
        raise BadRequest(f"image {text} names no host to pull it from; give one, or --registry")


def _token(text: str | None) -> str | None:
    return secret_in(text, "--token") if text is not None and text.startswith("@") else text


def _tls(bundle: Path | None) -> ssl.SSLContext | None:
    if bundle is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(bundle))
    except ssl.SSLError as error:
        raise BadRequest(f"{bundle} is not a PEM bundle") from error
