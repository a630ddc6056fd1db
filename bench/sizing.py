"""``python -m bench.sizing``: simulates large fleets from measured builds, and writes the generated
part of docs/sizing.md.

Build seconds and delta bytes are those of docs/benchmarks.md; the rate of a frontend is that of
docs/load.md. ``--measure`` first builds a release with 40 source releases on this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.corpus import CACHE
from bench.ready import Run, measure
from bench.simulation import Kind
from bench.sizing_page import MB, part, written

DOCS = Path(__file__).parents[1] / "docs"
PATH = CACHE / "sizing.json"
NOT_COUNTED = "large"
"""A pair of the benchmarks that tests memory, and is no typical release."""


def kinds(page: str) -> list[Kind]:
    """Returns the measured pairs of docs/benchmarks.md."""
    times = _table(page, "## Time", "pair")
    sizes = _table(page, "## Bytes", "pair")
    return [
        Kind(
            name,
            float(row["cold s"]),
            float(row["index cached s"]),
            int(sizes[name]["balanced"].replace(",", "")),
        )
        for name, row in times.items()
        if name != NOT_COUNTED and "**" not in name
    ]


def frontend_rate(page: str) -> float:
    """Returns the bytes a second that docs/load.md measured for a fleet at once."""
    found = re.search(r"\| bytes per second \| ([0-9,]+) MB \|", page)
    if found is None:
        raise ValueError("docs/load.md has no bytes per second")
    return float(found[1].replace(",", "")) * MB


def _table(page: str, heading: str, first: str) -> dict[str, dict[str, str]]:
    """Returns the rows of the first table after a heading, by their first cells."""
    lines = page[page.index(heading) :].splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |"))
    head = _cells(lines[begin])
    found = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        found[cells[0]] = dict(zip(head, cells, strict=True))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    """Measures if that is wanted, simulates, and writes the page."""
    parser = argparse.ArgumentParser(prog="bench.sizing", description=__doc__)
    parser.add_argument(
        "--measure", action="store_true", help="first build a release on this machine"
    )
    parser.add_argument(
        "--builds", type=int, nargs="+", default=[1, 2, 4], help="builds at a time to measure"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 4], help="workers to measure"
    )
    given = parser.parse_args()
    if given.measure:
        with tempfile.TemporaryDirectory() as folder:
            runs = measure(Path(folder), given.builds, given.workers)
        PATH.parent.mkdir(parents=True, exist_ok=True)
        PATH.write_text(json.dumps([asdict(run) for run in runs]))
    runs = [Run(**run) for run in json.loads(PATH.read_text())] if PATH.exists() else []
    pairs = kinds((DOCS / "benchmarks.md").read_text("utf-8"))
    rate = frontend_rate((DOCS / "load.md").read_text("utf-8"))
    began = time.monotonic()
    generated = part(pairs, rate, runs)
    print(generated)
    print(f"simulated in {time.monotonic() - began:.0f} s")
    path = DOCS / "sizing.md"
    path.write_text(written(path.read_text("utf-8"), generated), "utf-8")


if __name__ == "__main__":
    main()
