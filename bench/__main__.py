"""``python -m bench``: measures obdelta beside its peer. See ``--help``."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench import corpus, direct, packages, peer

EFFORTS = ("fast", "balanced", "small")


def main() -> int:
    """Gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures obdelta beside rdiff.")
    parser.add_argument("--direct", action="store_true", help="the delta builder alone; peer and bounds from the cache")
    parser.add_argument("--pair", action="append", metavar="NAME", help="only this pair (may be repeated)")
    parser.add_argument("--effort", action="append", choices=EFFORTS, help="balanced unless given (may be repeated)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a build")
    parser.add_argument("--bounds", action="store_true", help="zstd and bsdiff too (minutes when not cached yet)")
    parser.add_argument("--peer-only", action="store_true", help="with --direct: fill the caches, build nothing")
    parser.add_argument("--list", action="store_true", help="show the pairs and stop")
    options = parser.parse_args()
    recipes = [recipe for recipe in corpus.RECIPES if not options.pair or recipe.name in options.pair]
    if options.pair and len(recipes) != len(set(options.pair)):
        parser.error(f"the pairs are: {' '.join(recipe.name for recipe in corpus.RECIPES)}")
    if options.list:
        for recipe in recipes:
            print(f"{recipe.name:14} {recipe.kind}")
        return 0
    efforts = [] if options.peer_only else options.effort or ["balanced"]
    run_direct(recipes, efforts, options.threads, options.bounds)
    return 0


def run_direct(recipes: Iterable[corpus.Recipe], efforts: list[str], threads: int, with_bounds: bool) -> None:
    """Prints a row a pair and effort as it is made, geometric means in the end."""
    print(
        f"{'pair':14} {'effort':8} {'target':>7} {'peer':>10} {'ours':>10} {'ratio':>6} {'lit MB':>7} {'copy/MB':>7} {'small':>6}"
        f" {'peer s':>7} {'cold s':>7} {'ratio':>5} {'again s':>7} {'ratio':>5} {'RSS':>5} {'anon':>5}  stages"
    )
    ratios: dict[str, list[tuple[float, float, float]]] = {effort: [] for effort in efforts}
    for recipe in recipes:
        try:
            pair = corpus.build(recipe)
        except packages.Unavailable as error:
            print(f"{recipe.name:14} left out: {error}")
            continue
        with (
            tempfile.TemporaryDirectory(dir=corpus.CACHE, prefix="run-") as name,
            peer.concatenated(pair.base.layers, Path(name)) as base,
        ):
            scratch = Path(name)
            theirs = peer.cached(pair, base, scratch)
            target_bytes = sum(layer.tar_size for layer in peer.differing(pair))
            head = f"{target_bytes >> 20:>5}MB {theirs.size:>10,}"
            if with_bounds or not efforts:
                print(
                    f"{recipe.name:14} {'rdiff':8} {head} {'':10} {'':6} {'':7} {'':7} {'':6} {theirs.seconds:>7.1f}",
                    flush=True,
                )
            if with_bounds:
                bounds = peer.bounds(pair, base, scratch)
                for what, size in (("zstd", bounds.zstd), ("bsdiff", bounds.bsdiff)):
                    shown = f"{size:>10,} {size / theirs.size:>6.3f}" if size is not None else f" ({bounds.why})"
                    print(f"{recipe.name:14} {what:8} {head} {shown}", flush=True)
            for effort in efforts:
                index_dir = scratch / f"index-{effort}"
                index_dir.mkdir()
                cold, again = (
                    direct.build(pair, base, scratch, effort=effort, threads=threads, index_dir=index_dir)
                    for _ in range(2)
                )
                ratio = cold.size / theirs.size, cold.seconds / theirs.seconds, again.seconds / theirs.seconds
                if recipe.counted:
                    ratios[effort].append(ratio)
                stages = " ".join(f"{stage} {seconds:.1f}" for stage, seconds in cold.stages.items())
                print(
                    f"{recipe.name:14} {effort:8} {head} {cold.size:>10,} {ratio[0]:>6.3f} {cold.literal_bytes / 2**20:>7.2f}"
                    f" {cold.copies_per_mb:>7.0f} {cold.small_copies / max(cold.copies, 1):>6.0%} {theirs.seconds:>7.1f}"
                    f" {cold.seconds:>7.1f} {ratio[1]:>5.2f} {again.seconds:>7.1f} {ratio[2]:>5.2f}"
                    f" {cold.peak >> 20:>5} {cold.anonymous >> 20:>5}  {stages}",
                    flush=True,
                )
                if again.size != cold.size:
                    raise ValueError(f"{recipe.name}: {again.size} bytes with the index cached, {cold.size} without")
    for effort, rows in ratios.items():
        if rows:
            sizes, colds, agains = (geometric_mean(column) for column in zip(*rows, strict=True))
            print(
                f"geometric mean of {len(rows)} pairs, {effort}: bytes {sizes:.3f}, cold {colds:.2f}, again {agains:.2f}"
            )


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


if __name__ == "__main__":
    sys.exit(main())
