"""Problems that need an operator's attention: of the server, of builds, of the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twisted.web.template import Tag, tags

from obdelta.builds.types import BuildCancelled
from obdelta.net.certificates import SOON
from obdelta.store.catalogue.records import FailureRow, Outcome
from obdelta.web.operators.pages import number_format
from obdelta.web.operators.pages.advice import advice
from obdelta.web.operators.pages.help_page import CHECKS, TOPICS
from obdelta.web.operators.pages.markup import ALERT_ICON, ICON, Piece, moment
from obdelta.web.operators.pages.sections.status_data import StatusData

RECENT_SECONDS = 86400
"""Failed builds of the last day need attention; the list has older ones."""
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem. ``since`` in seconds UTC, ``link`` leads to more."""

    severity: str
    what: str
    since: float
    remedy: str
    link: str
    link_text: str


def problems(data: StatusData) -> list[Problem]:
    """Returns the present problems, errors first."""
    parts = (_checks, _warnings, _failures, _files, _certificates, _store, _fleet)
    found = [problem for part in parts for problem in part(data)]
    return sorted(found, key=lambda problem: problem.severity != ERROR)


def _checks(data: StatusData) -> Iterator[Problem]:
    for part, why in data.problems.items():
        if why is not None:
            yield Problem(
                severity=ERROR,
                what=f"Not ready: {part}: {why}",
                since=data.now - data.ages.get(part, 0.0),
                remedy=CHECKS.get(part, CHECKS["store"]).remedy,
                link=f"/help#{part}",
                link_text="About this check",
            )


def _warnings(data: StatusData) -> Iterator[Problem]:
    for line, age in data.warnings.items():
        yield Problem(
            severity=WARNING,
            what=line,
            since=data.now - age,
            remedy=TOPICS["replicas"].remedy,
            link="/help#replicas",
            link_text="About Redis and workers",
        )


def is_failed(row: FailureRow) -> bool:
    """Returns whether this is a failure, and no normal verdict on the images."""
    return row.outcome in (Outcome.ERROR, Outcome.PROOF_FAILED)


def _failures(data: StatusData) -> Iterator[Problem]:
    """Yields one problem for all failures with the same remedy."""
    groups: dict[str, list[FailureRow]] = {}
    for row in data.failures:
        cancelled = row.reason == str(BuildCancelled())
        if is_failed(row) and not cancelled and row.last > data.now - RECENT_SECONDS:
            groups.setdefault(advice(row), []).append(row)
    for remedy, rows in groups.items():
        count = "A build" if len(rows) == 1 else f"{number_format.number(len(rows))} builds"
        last = max(rows, key=lambda row: row.last)
        unproven = any(row.outcome is Outcome.PROOF_FAILED for row in rows)
        yield Problem(
            severity=ERROR if unproven else WARNING,
            what=f"{count} failed: {last.reason}",
            since=min(row.last for row in rows),
            remedy=remedy,
            link="/deltas?state=failed",
            link_text="Failed builds",
        )


@dataclass(frozen=True, slots=True)
class _File:
    """The texts about a file of a setting that cannot be used any more. ``what`` has places for its
    path and the reason.
    """

    what: str
    remedy: str
    topic: str
    link_text: str


_REREAD = "the server reads it again by itself. A restart would fail."
_FILES = {
    "tls-certificate": _File(
        "The new {path} cannot be used: {why}: the old one stays in force",
        f"Replace the file: {_REREAD}",
        "certificate",
        "About certificates",
    ),
    "auth-key": _File(
        "The key file {path} (auth-key) cannot be used: {why}: the old key stays in force",
        f"Restore the file, with the API's present key: {_REREAD}",
        "key",
        "About the key",
    ),
    "operator-passwords": _File(
        "The file {path} (operator-passwords) cannot be used: {why}: no one can log in",
        f"Repair the file, with lines of obdelta password: {_REREAD}",
        "passwords",
        "About passwords",
    ),
}


def _files(data: StatusData) -> Iterator[Problem]:
    for file in data.unusable_files:
        about = _FILES[file.setting]
        yield Problem(
            severity=ERROR,
            what=about.what.format(path=file.path, why=file.why),
            since=data.now - (data.clock - file.since),
            remedy=about.remedy,
            link=f"/help#{about.topic}",
            link_text=about.link_text,
        )


def _certificates(data: StatusData) -> Iterator[Problem]:
    for path, expires in data.certificates.items():
        left = expires - data.now
        if left < SOON:
            when = f"in {number_format.duration(left)}" if left > 0 else "already"
            yield Problem(
                severity=WARNING if left > 0 else ERROR,
                what=f"The certificate {path} expires {when}",
                since=expires - SOON,
                remedy="Renew it: the server reads the file again by itself.",
                link="/help#certificate",
                link_text="About certificates",
            )


def _store(data: StatusData) -> Iterator[Problem]:
    used = sum(data.store.values())
    if data.quota and used > data.quota:
        over = number_format.size(used - data.quota)
        yield Problem(
            severity=WARNING,
            what=f"The store is {over} above its quota",
            since=data.now,
            remedy="Nothing if it is short: content in use stays. Else raise store-quota.",
            link="/help#quota",
            link_text="About the quota",
        )


def _fleet(data: StatusData) -> Iterator[Problem]:
    if data.fleet_problem is not None:
        yield Problem(
            severity=WARNING,
            what=f"New releases are not seen: {data.fleet_problem}",
            since=data.fleet_problem_since,
            remedy="Check api-url and api-token. Devices still get their deltas when they ask.",
            link="/help#fleet",
            link_text="About the fleet",
        )


def title(found: Sequence[Problem]) -> str:
    """Returns the title of the first page, which tabs of a browser display."""
    if not found:
        return "obdelta"
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    return f"⚠ {count} · obdelta"


def icon(found: Sequence[Problem]) -> str:
    """Returns the path of the first page's icon."""
    return ALERT_ICON if found else ICON


def attention(data: StatusData) -> Tag:
    """Returns the block at the top of the first page; without a problem it is not displayed."""
    found = problems(data)
    state = {"data-title": title(found), "data-icon": icon(found)}
    if not found:
        return tags.section(id="attention", hidden="hidden", **state)
    return tags.section(
        tags.h2("Needs attention", id="attention-heading"),
        tags.ul(*(_item(problem, data.now) for problem in found), class_="problems"),
        id="attention",
        **{"aria-labelledby": "attention-heading", **state},
    )


def _item(problem: Problem, now: float) -> Tag:
    since: list[Piece] = ["began ", moment(problem.since, now)]
    return tags.li(
        tags.p(
            tags.strong(problem.severity.capitalize(), class_=f"severity {problem.severity}"),
            " ",
            tags.span(number_format.visible(problem.what), class_="what"),
            tags.small(*since),
        ),
        tags.p(problem.remedy, " ", tags.a(problem.link_text, href=problem.link)),
    )
