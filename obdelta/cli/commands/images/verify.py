"""``obdelta verify``: hashes every file of the store, and applies every delta image to its base."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdelta.cli.options import (
    OK,
    UNSATISFIED,
    Commands,
    add_json,
    add_setting_options,
    read_settings,
)
from obdelta.cli.tables import fields, printable
from obdelta.cli.terminal import Line
from obdelta.concurrency.cores import available_cores
from obdelta.errors import CatalogueUnusable
from obdelta.oci import Form
from obdelta.settings import Settings
from obdelta.store.lock import StateLock

if TYPE_CHECKING:
    from obdelta.oci import Digest
    from obdelta.store.audit import Inventory
    from obdelta.store.catalogue.records import DeltaRow

PROVEN, HASHED, EVICTED, UNPROVEN, DAMAGED = "proven", "hashed", "evicted", "unproven", "damaged"


def add_to(commands: Commands) -> None:
    parser = commands.add(
        "verify",
        run,
        "verify the files and deltas of state-dir",
        "Only reads, and may run beside a server. Hashes every file. Then applies every"
        " v3 delta to its base as a\n"
        "device does, and compares each layer with the target's diff_id. Base layers "
        "come from the cache, where they are\n"
        "hashed too, or from the upstream. A v2 batch was proven when it was built and "
        "is only hashed. Exits with 3 if\n"
        "anything is damaged. Deltas that cannot be proven (because the base is gone, "
        "say) are reported, but are no failure.",
        [
            "obdelta verify -c tap.conf",
            "obdelta verify --no-proof --json --state-dir /var/lib/obdelta",
        ],
    )
    parser.add_argument(
        "--no-proof", action="store_true", help="only hash files, without the upstream"
    )
    parser.add_argument(
        "--no-fetch",
        action="store_true",
        help="only prove deltas whose base layers are in the cache",
    )
    parser.add_argument(
        "--heal",
        action="store_true",
        help=(
            "remove damaged files and those of damaged deltas, which are rebuilt on "
            "request; requires that no server runs"
        ),
    )
    add_json(parser)
    add_setting_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Verifies the store and prints the report."""
    fallbacks = {"public-url": "http://localhost"} | (
        {"upstream": "http://localhost"} if parsed.no_proof else {}
    )
    configured = read_settings(parsed, fallbacks)
    if not (configured.state_dir / "catalogue.sqlite").exists():
        raise CatalogueUnusable(f"there is none in {configured.state_dir}")
    if parsed.heal:
        # Locks out servers until this process ends, so that none serves damaged files.
        lock = StateLock.take(configured.state_dir)
    with Line(sys.stderr) as line:
        report = _verify(configured, parsed, line)
    if parsed.heal:
        report = dataclasses.replace(report, removed=_remove_damaged(configured.state_dir, report))
        lock.close()
    print(json.dumps(report.as_json()) if parsed.json else report.as_text())
    return UNSATISFIED if report.damaged else OK


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for one delta. ``problem`` says why it is not proven."""

    row: DeltaRow
    state: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """``files`` were hashed, with ``size`` bytes in all. ``broken`` maps damaged files to the
    reason.
    """

    state_dir: Path
    files: int
    size: int
    broken: dict[Digest, str]
    verdicts: list[Verdict]
    removed: tuple[Digest, ...] | None = None
    """Files that ``--heal`` removed."""

    @property
    def damaged(self) -> bool:
        """Returns whether any file or delta is damaged."""
        return bool(self.broken) or any(verdict.state == DAMAGED for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Returns the report in the format of docs/commands.md."""
        from obdelta.web.operators.deltas_api import row_as_json

        return {
            "state_dir": str(self.state_dir),
            "files": {
                "hashed": self.files,
                "bytes": self.size,
                "damaged": [
                    {"digest": str(digest), "problem": why} for digest, why in self.broken.items()
                ],
            },
            "removed": None if self.removed is None else [str(digest) for digest in self.removed],
            "deltas": [
                row_as_json(v.row) | {"state": v.state, "problem": v.problem} for v in self.verdicts
            ],
        }

    def as_text(self) -> str:
        """Returns the report as text."""
        counts = Counter(verdict.state for verdict in self.verdicts)
        summary = ", ".join(
            f"{counts[state]:,} {state}"
            for state in (PROVEN, HASHED, EVICTED, UNPROVEN, DAMAGED)
            if counts[state]
        )
        head = fields(
            [
                ("state-dir", str(self.state_dir)),
                (
                    "files",
                    f"{self.files:,} hashed, {self.size:,} bytes, {len(self.broken):,} damaged",
                ),
                ("deltas", f"{len(self.verdicts):,}" + (f": {summary}" if summary else "")),
            ]
        )
        lines = [f"  {digest}: {why}" for digest, why in self.broken.items()]
        parts = [head, *(["damaged files\n" + "\n".join(lines)] if lines else [])]
        for state in (DAMAGED, UNPROVEN):
            lines = [
                f"  {_name(v.row)}: {printable(v.problem or '')}"
                for v in self.verdicts
                if v.state == state
            ]
            parts += [f"{state} deltas\n" + "\n".join(lines)] if lines else []
        if self.removed:
            parts.append(
                f"{len(self.removed):,} files removed: when the server starts, it drops the deltas"
                " that they belong to"
            )
        return "\n\n".join(parts)


def _remove_damaged(state_dir: Path, report: Report) -> tuple[Digest, ...]:
    """Removes files, so that the next start drops the deltas that lack them.

    These are damaged files, and one file of each damaged delta. That file names base and target, so
    no other delta needs it.
    """
    from obdelta.oci import Manifest, parse_manifest
    from obdelta.store.audit import blob_path, read_inventory

    chosen = dict.fromkeys(report.broken)
    manifests = read_inventory(state_dir).manifests
    for verdict in report.verdicts:
        if verdict.state != DAMAGED:
            continue
        content = verdict.row.content
        if verdict.row.key.kind == "v2":
            chosen[content] = None
            continue
        media_type, raw = manifests[content]
        manifest = parse_manifest(raw, media_type, "the delta's manifest")
        if isinstance(manifest, Manifest):
            chosen[manifest.config.digest] = None
    for digest in chosen:
        blob_path(state_dir, digest).unlink(missing_ok=True)
    return tuple(chosen)


def _name(row: DeltaRow) -> str:
    base, target = row.key.base.hex[:12], row.key.target.hex[:12]
    kind = (
        row.key.kind if row.key.form is Form.UNIVERSAL else f"{row.key.kind} {row.key.form.value}"
    )
    return f"{kind} {row.base_repository}@{base} -> {row.target_repository}@{target}"


def _verify(configured: Settings, parsed: argparse.Namespace, line: Line) -> Report:
    from obdelta.store.audit import read_inventory

    inventory = read_inventory(configured.state_dir)
    broken = _hash(configured.state_dir, inventory.blobs, line)
    verdicts = [_hashed(row, inventory, broken) for row in inventory.deltas]
    if not parsed.no_proof:
        sound = [v.row for v in verdicts if v.state == HASHED and v.row.key.kind == "v3"]
        if sound:
            proofs = _prove(configured, inventory, sound, line, fetch=not parsed.no_fetch)
            verdicts = [proofs.get(v.row.content, v) if v.state == HASHED else v for v in verdicts]
    if broken or any(verdict.state == DAMAGED for verdict in verdicts):
        # A server may have removed a file meanwhile, which is no damage.
        now = read_inventory(configured.state_dir)
        still = {row.key for row in now.deltas}
        broken = {digest: why for digest, why in broken.items() if digest in now.blobs}
        verdicts = [
            v
            for v in verdicts
            if v.state != DAMAGED
            or (v.row.key in still and not now.parts[v.row.content] & now.evicted)
        ]
    return Report(
        configured.state_dir, len(inventory.blobs), sum(inventory.blobs.values()), broken, verdicts
    )


def _hash(state_dir: Path, blobs: dict[Digest, int], line: Line) -> dict[Digest, str]:
    from obdelta.store.audit import blob_path, find_problem

    whole, done = sum(blobs.values()), 0
    broken: dict[Digest, str] = {}
    over = False
    lock = threading.Lock()

    def read(size: int) -> None:
        nonlocal done
        if over:
            raise CancelledError
        with lock:
            done += size
            line.show("hashing files", done / whole)

    def look(item: tuple[Digest, int]) -> str | None:
        return find_problem(blob_path(state_dir, item[0]), *item, read)

    pool = ThreadPoolExecutor(available_cores())
    try:
        for digest, problem in zip(blobs, pool.map(look, blobs.items()), strict=True):
            if problem is not None:
                broken[digest] = problem
    finally:
        over = True  # after an interrupt, finish neither the rest nor the running proof
        pool.shutdown(cancel_futures=True)
    return broken


def _hashed(row: DeltaRow, inventory: Inventory, broken: dict[Digest, str]) -> Verdict:
    parts = inventory.parts[row.content]
    bad = sorted(str(digest) for digest in parts if digest in broken)
    if bad:
        return Verdict(
            row,
            DAMAGED,
            f"its file {bad[0]} is damaged"
            + (f", and {len(bad) - 1} more" if len(bad) > 1 else ""),
        )
    return Verdict(row, EVICTED if parts & inventory.evicted else HASHED)


def _prove(
    configured: Settings, inventory: Inventory, rows: Iterable[DeltaRow], line: Line, *, fetch: bool
) -> dict[Digest, Verdict]:
    from obdelta.cli import run_reactor
    from obdelta.cli.delta_proof import prove

    with tempfile.TemporaryDirectory(prefix="obdelta-") as work:
        # Blobs that are fetched for the proof go there, and are removed at the end.
        own = dataclasses.replace(configured, state_dir=Path(work))
        state_dir, selected = configured.state_dir, list(rows)
        found = run_reactor.run(
            own,
            lambda runtime: prove(runtime, state_dir, inventory, selected, line, fetch=fetch),
        )
    return {
        row.content: Verdict(
            row, UNPROVEN if proof.unproven else DAMAGED if proof.problem else PROVEN, proof.problem
        )
        for row, proof in found
    }
