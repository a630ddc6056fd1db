"""Figures of the delta builder alone, without a server: ``python -m bench --direct``."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench import corpus, direct, peer
from bench.corpus import Pair
from bench.results import geometric_mean


def run_direct(pairs: Iterable[Pair], efforts: list[str], threads: int, with_bounds: bool) -> None:
    """Prints a row after each build (a pair with an effort), then geometric means."""
    print(
        f"{'pair':14} {'effort':8} {'target':>7} {'peer':>10} {'ours':>10} {'ratio':>6}"
        f" {'lit MB':>7} {'copy/MB':>7} {'small':>6} {'peer s':>7} {'cold s':>7} {'ratio':>5}"
        f" {'again s':>7} {'ratio':>5} {'peercpu':>7} {'cold':>6} {'again':>6} {'RSS':>5}"
        f" {'anon':>5}  stages"
    )
    ratios: dict[str, list[tuple[float, float, float]]] = {effort: [] for effort in efforts}
    for pair in pairs:
        recipe = pair.recipe
        with (
            tempfile.TemporaryDirectory(dir=corpus.CACHE, prefix="run-") as name,
            peer.concatenated(pair.base.layers, Path(name)) as base,
        ):
            scratch = Path(name)
            rdiff = peer.cached(pair, base, scratch)
            target_bytes = sum(layer.tar_size for layer in peer.differing(pair))
            head = f"{target_bytes >> 20:>5}MB {rdiff.size:>10,}"
            if with_bounds or not efforts:
                print(
                    f"{recipe.name:14} {'rdiff':8} {head} {'':40} {rdiff.seconds:>7.1f}",
                    flush=True,
                )
            if with_bounds:
                bounds = peer.bounds(pair, base, scratch, seconds=math.inf)
                for what, size in (("zstd", bounds.zstd), ("bsdiff", bounds.bsdiff)):
                    shown = (
                        f"{size:>10,} {size / rdiff.size:>6.3f}"
                        if size is not None
                        else f" ({bounds.why})"
                    )
                    print(f"{recipe.name:14} {what:8} {head} {shown}", flush=True)
            for effort in efforts:
                index_dir = scratch / f"index-{effort}"
                index_dir.mkdir()
                cold, again = (
                    direct.build(
                        pair, base, scratch, effort=effort, threads=threads, index_dir=index_dir
                    )
                    for _ in range(2)
                )
                ratio = (
                    cold.size / rdiff.size,
                    cold.seconds / rdiff.seconds,
                    again.seconds / rdiff.seconds,
                )
                if recipe.counted:
                    ratios[effort].append(ratio)
                stages = " ".join(
                    f"{stage} {seconds:.1f}" for stage, seconds in cold.stages.items()
                )
                print(
                    f"{recipe.name:14} {effort:8} {head} {cold.size:>10,} {ratio[0]:>6.3f}"
                    f" {cold.literal_bytes / 2**20:>7.2f} {cold.copies_per_mb:>7.0f}"
                    f" {cold.small_copies / max(cold.copies, 1):>6.0%} {rdiff.seconds:>7.1f}"
                    f" {cold.seconds:>7.1f} {ratio[1]:>5.2f} {again.seconds:>7.1f} {ratio[2]:>5.2f}"
                    f" {rdiff.cpu:>7.1f} {cold.cpu:>6.1f} {again.cpu:>6.1f} {cold.peak >> 20:>5}"
                    f" {cold.anonymous >> 20:>5}  {stages}",
                    flush=True,
                )
                if again.size != cold.size:
                    raise ValueError(
                        f"{recipe.name}: {again.size} bytes with the index cached, {cold.size}"
                        " without"
                    )
    for effort, rows in ratios.items():
        if rows:
            sizes, colds, agains = (geometric_mean(column) for column in zip(*rows, strict=True))
            print(
                f"geometric mean of {len(rows)} pairs, {effort}: bytes {sizes:.3f}, cold"
                f" {colds:.2f}, again {agains:.2f}"
            )
