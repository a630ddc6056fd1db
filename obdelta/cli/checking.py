"""``obdelta check``: one verified update against any delta server, and its figures."""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from obdelta.cli.bars import Line
from obdelta.device import Device, Engine, Http, Update
from obdelta.errors import BadRequest
from obdelta.oci.reference import Reference


def check(parsed: argparse.Namespace) -> Update:
    """Runs the update and prints it; raises whatever kept it from being verified."""
    token = _token(parsed.token)
    http = Http(tls=_tls(parsed.ca))
    line = Line(sys.stderr)
    device = Device(http, Engine(http, token, parsed.registry, parsed.platform), parsed.server, token, step=line.show)
    source = _named(parsed.source, parsed.registry)
    _named(parsed.target, parsed.registry)
    with tempfile.TemporaryDirectory(prefix="obdelta-") as work, line:
        base = device.load_base(source, Path(work))
        update = device.update(base, parsed.source, parsed.target, Path(work), deadline=parsed.wait)
    print(as_json(update) if parsed.json else as_text(update))
    return update


def as_text(update: Update) -> str:
    """The figures for people."""
    what = "delta" if update.is_delta else "full pull (the server gave no delta)"
    return (
        f"verified: {what} {update.name}\n"
        f"image ID       {update.image_id}\n"
        f"full update    {update.full_bytes:>15,} bytes\n"
        f"pulled         {update.pulled_bytes:>15,} bytes ({update.saving:.1%} saved, {update.layers} layers)\n"
        f"asked          {update.asking_seconds:>15.2f} s ({update.asked} times)\n"
        f"pulled in      {update.pulling_seconds:>15.2f} s\n"
        f"patched in     {update.patching_seconds:>15.2f} s"
    )


def as_json(update: Update) -> str:
    """The figures for programs, on one line."""
    return json.dumps(asdict(update) | {"image_id": str(update.image_id), "saving": update.saving, "verified": True})


def _named(text: str, registry: str | None) -> Reference:
    reference = Reference.parse(text)
    if not reference.host and registry is None:
        raise BadRequest(f"image {text} names no host to pull it from; give one, or --registry")
    return reference


def _token(text: str | None) -> str | None:
    return Path(text[1:]).read_text("utf-8").strip() if text is not None and text.startswith("@") else text


def _tls(bundle: Path | None) -> ssl.SSLContext | None:
    if bundle is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(bundle))
    except ssl.SSLError as error:
        raise BadRequest(f"{bundle} is not a PEM bundle") from error
