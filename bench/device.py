"""``python -m bench.device``: what an update costs a device, by pair, form and link.

A delta's bytes and commands are measured; its seconds are modelled (:mod:`bench.device_model`).

The engine's own delta is played by ``rdiff`` and ``gzip``, as in :mod:`bench.peer`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import corpus, packages, peer
from bench.corpus import CACHE, Pair
from bench.device_model import LINKS, Delta, Measured
from bench.device_report import BEGIN, END, PAGE, PLOT, draw, goals, page
from bench.images import Layer
from obdelta.delta.build import Effort, LayerBuilder, LayerFile
from obdelta.delta.effort import command_prices
from obdelta.oci import Form


def commands_of(stream: bytes) -> int:
    """The number of copies and literals in a librsync stream."""
    at, commands = 4, 0
    while code := stream[at]:
        commands += 1
        if code <= 0x40:
            at += 1 + code
        elif code <= 0x44:
            width = 1 << (code - 0x41)
            at += 1 + width + int.from_bytes(stream[at + 1 : at + 1 + width], "big")
        else:
            at += 1 + (1 << (code - 0x45 >> 2)) + (1 << (code - 0x45 & 3))
    return commands


def _engine_delta(base: Path, targets: Sequence[Path], scratch: Path) -> Delta:
    signature, delta, tar, blob = (
        scratch / f"engine.{what}" for what in ("signature", "delta", "tar", "gz")
    )
    size = commands = 0
    peer.sign(base, signature)
    for target in targets:
        peer.make_delta(signature, target, delta)
        commands += commands_of(delta.read_bytes())
        peer.wrap(delta, tar)
        peer.compress(tar, blob)
        size += blob.stat().st_size
    return Delta(size, commands)


def _layer_file(layer: Layer) -> LayerFile:
    return LayerFile(layer.diff_id, corpus.tar_path(layer), layer.tar_size)


def _entries(layer: Layer) -> int:
    with tarfile.open(corpus.tar_path(layer)) as tar:
        return sum(1 for _ in tar)


def measure(pair: Pair, efforts: Sequence[Effort], scratch: Path) -> Measured:
    """Builds all deltas of a pair."""
    differing = peer.differing(pair)
    with peer.concatenated(pair.base.layers, scratch) as base:
        engine = _engine_delta(base, [corpus.tar_path(layer) for layer in differing], scratch)
    files = [_layer_file(layer) for layer in pair.base.layers]
    deltas = {}
    for effort in efforts:
        for name, link in LINKS.items():
            if effort is Effort.SMALL and link:
                continue  # its goal is about bytes alone
            sizes, commands = dict.fromkeys(Form, 0), dict.fromkeys(Form, 0)
            prices = command_prices(link)
            with LayerBuilder(
                files, prices=prices, effort=effort, threads=2, index_dir=scratch
            ) as builder:
                for layer in differing:
                    held = layer.diff_id in pair.base.diff_ids
                    target = layer.diff_id if held else _layer_file(layer)
                    outs = {form: scratch / form.value for form in Form}
                    made = builder.build(target, outs)
                    for form, delta in made.items():
                        sizes[form] += delta.size
                        commands[form] += delta.copies + delta.literals
            for form in Form:
                deltas[f"{effort.value} {form.value} {name}"] = Delta(sizes[form], commands[form])
    return Measured(
        name=pair.recipe.name,
        full=sum(layer.size for layer in differing),
        unpacked=sum(layer.tar_size for layer in differing),
        files=sum(map(_entries, differing)),
        base_files=sum(map(_entries, pair.base.layers)),
        engine=engine,
        deltas=deltas,
    )


def load(path: Path) -> list[Measured]:
    """Returns the measurements of an earlier run, without those that lack numbers of files."""
    found = []
    for fields in json.loads(path.read_bytes()) if path.exists() else []:
        if "base_files" not in fields:
            continue
        fields["engine"] = Delta(**fields["engine"])
        fields["deltas"] = {name: Delta(**delta) for name, delta in fields["deltas"].items()}
        found.append(Measured(**fields))
    return found


def main() -> int:
    """Measures, prints the goals, and writes the page where all pairs were measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--pair", action="append", metavar="NAME", help="only this pair")
    parser.add_argument(
        "--effort", action="append", choices=[effort.value for effort in Effort], default=None
    )
    parser.add_argument("--report", action="store_true", help="the figures of the last run")
    options = parser.parse_args()
    efforts = [Effort(name) for name in options.effort or ("balanced", "small")]
    path = CACHE / "device.json"
    done = {pair.name: pair for pair in load(path)}
    for recipe in corpus.RECIPES:
        wanted = recipe.counted and (not options.pair or recipe.name in options.pair)
        if options.report or not wanted:
            continue
        try:
            pair = corpus.build(recipe)
        except packages.Unavailable as error:
            print(f"{recipe.name:14} left out: {error}")
            continue
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="run-") as scratch:
            done[recipe.name] = measure(pair, efforts, Path(scratch))
        path.write_text(json.dumps([asdict(each) for each in done.values()], indent=1))
        print(f"{recipe.name:14} measured", flush=True)
    pairs = [pair for pair in done.values() if not options.pair or pair.name in options.pair]
    for row in goals(pairs, efforts):
        print(f"{row[0]:50} {row[1]:28} {row[2]}")
    if not options.pair:
        draw(pairs, PLOT)
        text = PAGE.read_text()
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(head + BEGIN + page(pairs, efforts) + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
