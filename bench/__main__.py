"""``python -m bench``: measures obdelta beside open-balena-delta. See ``--help``."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from bench import corpus, direct, packages, peer, releases, results, served, v2
from bench.corpus import Pair
from bench.direct_table import run_direct
from bench.registry import serving
from bench.results import EFFORTS, Result, geometric_mean

T = TypeVar("T")

REPEATS = 3
LONG_SECONDS = 10
"""A pair for which open-balena-delta takes longer than this is measured once: noise matters little
there.
"""
V2_SECONDS = 240.0
"""Above this, no other pair is started: unpacked images take long, and ``--v2`` measures all of
them.
"""
BOUNDS_SECONDS = 120.0


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=(
            "Measures obdelta, as it runs, beside rdiff; writes docs/benchmarks.md and its plot"
            " when all pairs were run."
        ),
    )
    parser.add_argument(
        "--direct",
        action="store_true",
        help="the delta builder alone; peer and bounds from the cache",
    )
    parser.add_argument(
        "--pair", action="append", metavar="NAME", help="only this pair (may be repeated)"
    )
    parser.add_argument(
        "--effort",
        action="append",
        choices=EFFORTS,
        help="with --direct: balanced unless given (may be repeated)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of a build without the server"
    )
    parser.add_argument(
        "--bounds",
        action="store_true",
        help="with --direct: zstd and bsdiff too (minutes when not cached yet)",
    )
    parser.add_argument(
        "--v2-seconds",
        type=float,
        default=V2_SECONDS,
        metavar="S",
        help="for rsync batches, all pairs together (default %(default)g)",
    )
    parser.add_argument(
        "--bounds-seconds",
        type=float,
        default=BOUNDS_SECONDS,
        metavar="S",
        help=(
            "without --direct: for zstd and bsdiff where not cached, all together (default"
            " %(default)g)"
        ),
    )
    parser.add_argument(
        "--peer-only", action="store_true", help="with --direct: fill the caches, build nothing"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=REPEATS,
        metavar="N",
        help=(
            f"seconds are the median of N runs, where the peer takes less than {LONG_SECONDS} s"
            " (default %(default)s)"
        ),
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the page again from the last run's figures, and stop",
    )
    parser.add_argument(
        "--v2",
        action="store_true",
        help="rsync batches only, beside rsync as open-balena-delta runs it",
    )
    parser.add_argument(
        "--releases", action="store_true", help="the commonest kinds of release only, beside rdiff"
    )
    parser.add_argument("--list", action="store_true", help="show the pairs and stop")
    options = parser.parse_args()
    recipes = [
        recipe for recipe in corpus.RECIPES if not options.pair or recipe.name in options.pair
    ]
    if options.pair and len(recipes) != len(set(options.pair)):
        parser.error(f"the pairs are: {' '.join(recipe.name for recipe in corpus.RECIPES)}")
    if options.list:
        for recipe in recipes:
            print(f"{recipe.name:14} {recipe.kind}")
    elif options.v2:
        run_v2(recipes)
    elif options.releases:
        releases.run()
    elif options.report:
        _write_page(results.load(), options.repeat)
    elif options.direct:
        efforts = [] if options.peer_only else options.effort or ["balanced"]
        run_direct(_built(recipes), efforts, options.threads, options.bounds)
    else:
        run_all(
            recipes, options.threads, options.repeat, options.v2_seconds, options.bounds_seconds
        )
    return 0


# -- everything --------------------------------------------------------------------------------


def run_all(
    recipes: Sequence[corpus.Recipe],
    threads: int,
    repeats: int,
    v2_seconds: float,
    bounds_seconds: float,
) -> None:
    """Measures the pairs, then v2, then the bounds. The page is written after each of them, if no
    pair was left out.
    """
    found = []
    whole = len(recipes) == len(corpus.RECIPES)
    with serving(corpus.CACHE / "registry") as registry:
        pairs = list(_built(recipes))
        for pair in pairs:
            found.append(_measured(pair, registry, threads, repeats))
            print(_line(found[-1]), flush=True)
        _sum_up(found, repeats, whole)
        # The quickest pairs first, so that a run that is stopped early has more figures.
        order = sorted(
            range(len(pairs)),
            key=lambda number: found[number].base_bytes + found[number].target_bytes,
        )
        end = time.monotonic() + v2_seconds
        for number in order:
            if time.monotonic() < end:
                _measure_v2(pairs[number], registry)
    if whole:
        releases.run()
    _sum_up(found, repeats, whole)
    end = time.monotonic() + bounds_seconds
    for number in order:
        found[number] = replace(
            found[number], bounds=_bounds(pairs[number], end - time.monotonic())
        )
    _sum_up(found, repeats, whole)


def _sum_up(found: Sequence[Result], repeats: int, whole: bool) -> None:
    counted = [result for result in found if result.counted]
    if counted:
        sizes = " ".join(
            f"{effort} {geometric_mean(r.ratio(effort) for r in counted):.3f}" for effort in EFFORTS
        )
        cold, indexed = (
            geometric_mean(r.cold for r in counted),
            geometric_mean(r.indexed for r in counted),
        )
        print(
            f"geometric mean of {len(counted)} pairs, of the peer's: bytes {sizes}; seconds cold"
            f" {cold:.2f} indexed {indexed:.2f}"
        )
    if whole:
        results.save(found)
        _write_page(found, repeats)


def _bounds(pair: Pair, seconds: float) -> peer.Bounds:
    if not pair.recipe.counted:
        return peer.Bounds(None, None, "left out of the means")
    with (
        tempfile.TemporaryDirectory(dir=corpus.CACHE, prefix="run-") as name,
        peer.concatenated(pair.base.layers, Path(name)) as base,
    ):
        return peer.bounds(pair, base, Path(name), seconds=seconds)


def run_v2(recipes: Iterable[corpus.Recipe]) -> None:
    """Measures v2 alone; ``--report`` writes it into the page."""
    with serving(corpus.CACHE / "registry") as registry:
        for pair in _built(recipes):
            _measure_v2(pair, registry)


def _measure_v2(pair: Pair, registry: str) -> None:
    result = v2.measured(pair, registry)
    if result is None:
        print(f"{pair.recipe.name:14} v2 left out: the reference needs root", flush=True)
    else:
        v2.save([result])
        print(v2.line(result), flush=True)


def _measured(pair: Pair, registry: str, threads: int, repeats: int) -> Result:
    with (
        tempfile.TemporaryDirectory(dir=corpus.CACHE, prefix="run-") as name,
        peer.concatenated(pair.base.layers, Path(name)) as base,
    ):
        scratch = Path(name)
        differing = peer.differing(pair)
        targets = [corpus.tar_path(layer) for layer in differing]
        efforts = {}
        for effort in EFFORTS if pair.recipe.counted else ("balanced",):
            with tempfile.TemporaryDirectory(dir=scratch) as index:
                efforts[effort] = direct.build(
                    pair, base, scratch, effort=effort, threads=threads, index_dir=Path(index)
                )
        # open-balena-delta and the server take turns, so that other work on the machine affects
        # both.
        rounds: list[tuple[peer.Peer, served.Served]] = []
        while len(rounds) < (repeats if not rounds or rounds[0][0].seconds < LONG_SECONDS else 1):
            rdiff = peer.measure(base, targets, scratch)
            rounds.append((rdiff, served.measure(pair, registry, base, scratch, effort="balanced")))
        if any(sum(server.layer_sizes) != efforts["balanced"].size for _, server in rounds):
            raise ValueError(
                f"{pair.recipe.name}: the server's delta has not the size of the builder's"
            )
        return Result(
            name=pair.recipe.name,
            kind=pair.recipe.kind,
            counted=pair.recipe.counted,
            changes=list(pair.changes),
            base_bytes=sum(layer.tar_size for layer in pair.base.layers),
            target_bytes=sum(layer.tar_size for layer in differing),
            full=sum(layer.size for layer in differing),
            peer=_median([rdiff for rdiff, _ in rounds], lambda rdiff: rdiff.seconds),
            bounds=peer.Bounds(None, None),
            efforts=efforts,
            load=os.getloadavg()[0],
            served=replace(
                _median([server for _, server in rounds], lambda server: server.cold),
                indexed=statistics.median_low(server.indexed for _, server in rounds),
                worker_peak=max(server.worker_peak for _, server in rounds),
                worker_anonymous=max(server.worker_anonymous for _, server in rounds),
                proxy_peak=max(server.proxy_peak for _, server in rounds),
            ),
        )


def _median(values: Sequence[T], key: Callable[[T], float]) -> T:
    return sorted(values, key=key)[(len(values) - 1) // 2]


def _line(result: Result) -> str:
    sizes = " ".join(
        f"{effort} {result.efforts[effort].size:,} ({result.ratio(effort):.3f})"
        for effort in result.efforts
    )
    return (
        f"{result.name:14} full {result.full:,} peer {result.peer.size:,} {sizes} | peer"
        f" {result.peer.seconds:.1f} s cold {result.served.cold:.1f} s ({result.cold:.2f}) indexed"
        f" {result.served.indexed:.1f} s ({result.indexed:.2f}) | worker"
        f" {result.served.worker_peak >> 20} MB, {result.served.worker_anonymous >> 20} MB"
        f" anonymous, proxy {result.served.proxy_peak >> 20} MB"
    )


def _write_page(found: Sequence[Result], repeats: int) -> None:
    from bench import plot, report  # matplotlib is only needed here

    plot.draw(found, report.PLOT)
    report.write(found, repeats, v2.load(), releases.load())
    print(f"wrote {report.PAGE} and {report.PLOT.name}")


def _built(recipes: Iterable[corpus.Recipe]) -> Iterable[Pair]:
    for recipe in recipes:
        try:
            yield corpus.build(recipe)
        except packages.Unavailable as error:
            print(f"{recipe.name:14} left out: {error}")


if __name__ == "__main__":
    sys.exit(main())
