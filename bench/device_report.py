"""The report of ``bench.device``: goals, tables and the plot of ``docs/update-time.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.corpus import CACHE
from bench.device_model import COMMAND_RANGE, ENGINES, LINKS, PROFILES, Measured
from bench.results import geometric_mean, table
from obdelta.delta.build import RECIPE, Effort
from obdelta.delta.effort import arriving_bytes, command_prices
from obdelta.oci import Form

PAGE = CACHE.parent / "docs" / "update-time.md"
PLOT = CACHE.parent / "docs" / "update-time.png"
BEGIN, END = "<!-- bench-device begins -->\n", "<!-- bench-device ends -->\n"


def _bytes_and_commands(pairs: Sequence[Measured], effort: Effort) -> Iterator[str]:
    for form in Form:
        yield f"Bytes, and commands in brackets, of {form.value} at effort `{effort.value}`:\n\n"
        rows = []
        for pair in pairs:
            shown = [pair.engine, *(pair.delta(effort, form, link) for link in LINKS)]
            cells = [f"{delta.size:,} ({delta.commands:,})" for delta in shown]
            rows.append([pair.name, f"{pair.full:,}", *cells])
        yield table(["pair", "full pull", "engine's own", *LINKS], rows) + "\n"


def _times(pairs: Sequence[Measured]) -> Iterator[str]:
    yield "Modelled seconds with `device-link` at the profile's own speed, and as a share of the"
    yield " best alternative:\n\n"
    head = ["pair", *(f"{ENGINES[form]}, {profile.name}" for form in Form for profile in PROFILES)]
    rows, shares = [], dict[tuple[Form, str], list[float]]()
    for pair in pairs:
        row = [pair.name]
        for form in Form:
            for profile in PROFILES:
                seconds = pair.update(form, profile)
                share = seconds / pair.best(form, profile)
                shares.setdefault((form, profile.name), []).append(share)
                row.append(f"{seconds:.1f} s ({share:.2f})")
        rows.append(row)
    means = [f"**{geometric_mean(found):.2f}**" for found in shares.values()]
    yield table(head, [*rows, ["**geometric mean of shares**", *means]]) + "\n"


def _regret(pairs: Sequence[Measured]) -> Iterator[str]:
    """Yields the cost of a wrong time of a command on engine 25: the plans of all links serve as
    plans for other times of a command at one link.
    """
    profile = PROFILES[1]
    yield f"Seconds on engine 25 at {profile.name}, as a share of those of the best row:\n\n"
    means_of: dict[str, list[float]] = {}
    for true in COMMAND_RANGE:
        shares = {link: list[float]() for link in LINKS}
        for pair in pairs:
            taken = {
                link: pair.seconds(
                    pair.delta(Effort.BALANCED, Form.ZSTD, link), Form.ZSTD, profile, true
                )
                for link in LINKS
            }
            for link, seconds in taken.items():
                shares[link].append(seconds / min(taken.values()))
        for link, found in shares.items():
            means_of.setdefault(link, []).append(geometric_mean(found))
    rows = []
    for link, means in means_of.items():
        price = command_prices(LINKS[link])[Form.ZSTD]
        assumed = price / command_prices(profile.link, {Form.ZSTD: 1.0})[Form.ZSTD]
        rows.append([f"{assumed:.0f} µs", *(f"{mean:.2f}" for mean in (*means, max(means)))])
    head = ["assumed time of a command", *(f"true: {true} µs" for true in COMMAND_RANGE), "worst"]
    yield table(head, rows) + "\n"


def _better_form(pairs: Sequence[Measured]) -> Iterator[str]:
    """Yields how often gzip costs engine 25 less than zstd. That engine reads both forms, and each
    has a plan of its own.
    """
    better = [
        f"{pair.name} at {name}"
        for pair in pairs
        for name, link in LINKS.items()
        if _cost(pair, Form.GZIP, name, link) < _cost(pair, Form.ZSTD, name, link)
    ]
    whole = len(pairs) * len(LINKS)
    yield f"Gzip costs engine 25 less than zstd in {len(better)} of {whole} deltas"
    yield f"{': ' if better else ''}{', '.join(better)}.\n\n"


def _cost(pair: Measured, form: Form, name: str, link: float) -> float:
    delta = pair.delta(Effort.BALANCED, form, name)
    return delta.size + arriving_bytes(delta.commands, command_prices(link)[Form.ZSTD])


def goals(pairs: Sequence[Measured], efforts: Sequence[Effort]) -> Iterator[tuple[str, str, str]]:
    """The goals, each with what is reached for zstd and gzip."""

    def shown(values: dict[Form, float], limits: dict[Form, float]) -> tuple[str, str]:
        cells = [
            f"{values[form]:.3f} (≤ {limits[form]:g}: {_met(values[form], limits[form])})"
            for form in (Form.ZSTD, Form.GZIP)
        ]
        return cells[0], cells[1]

    def size(counted: Sequence[Measured], effort: Effort, link: str) -> dict[Form, float]:
        return {
            form: geometric_mean(
                pair.delta(effort, form, link).size / pair.engine.size for pair in counted
            )
            for form in Form
        }

    small = [pair for pair in pairs if pair.has(Effort.SMALL)]
    if Effort.SMALL in efforts and small:
        limits = {Form.ZSTD: 0.34, Form.GZIP: 0.385}
        what = f"bytes ÷ engine's own, `small`, `metered`, {len(small)} pairs"
        yield what, *shown(size(small, Effort.SMALL, "metered"), limits)
    limits = {Form.ZSTD: 0.45, Form.GZIP: 0.50}
    yield (
        "bytes ÷ engine's own, defaults",
        *shown(size(pairs, Effort.BALANCED, "0.5 Mbit/s"), limits),
    )
    worst = dict.fromkeys(Form, 0.0)
    for profile in PROFILES:
        means = {}
        for form in Form:
            shares = [pair.update(form, profile) / pair.best(form, profile) for pair in pairs]
            means[form] = geometric_mean(shares)
            worst[form] = max(worst[form], *shares)
        yield f"time ÷ best alternative, {profile.name}", *shown(means, profile.goals)
    limits = {Form.ZSTD: 1.15, Form.GZIP: 1.20}
    yield "worst pair at its own setting", *shown(worst, limits)


def _met(value: float, limit: float) -> str:
    return "met" if value <= limit else "missed"


def page(pairs: Sequence[Measured], efforts: Sequence[Effort]) -> str:
    rows = [list(row) for row in goals(pairs, efforts)]
    parts = [
        "### Goals\n\n",
        f"The tables from here to *Measured on real engines* are for recipe {RECIPE}.\n\n",
        table(["geometric mean", "engine 25 (zstd)", "engine 20 (gzip)"], rows) + "\n",
        "### A wrong price\n\n",
        *_regret(pairs),
        "### The better form for newer engines\n\n",
        *_better_form(pairs),
        "### Seconds\n\n",
        *_times(pairs),
        "### Bytes and commands\n\n",
        *_bytes_and_commands(pairs, Effort.BALANCED),
    ]
    return "".join(parts)


def draw(pairs: Sequence[Measured], path: Path) -> None:
    """Draws bytes against commands, both as a share of the engine's own: a line for each form."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for form, colour in ((Form.GZIP, "#e69f00"), (Form.ZSTD, "#0072b2")):
        points = []
        for link in LINKS:
            made = [(pair, pair.delta(Effort.BALANCED, form, link)) for pair in pairs]
            points.append(
                (
                    geometric_mean(delta.commands / pair.engine.commands for pair, delta in made),
                    geometric_mean(delta.size / pair.engine.size for pair, delta in made),
                )
            )
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=form.value)
        for link, point in zip(LINKS, points, strict=True):
            axes.annotate(link, point, xytext=(4, 6), textcoords="offset points", fontsize="small")
    axes.plot([1], [1], marker="s", color="#777777", label="the engine's own delta")
    axes.set_xscale("log")
    axes.set_xlabel("commands, as a share of the engine's own (logarithmic)")
    axes.set_ylabel("bytes, as a share of the engine's own")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
