"""The block of problems: which are in it, in which order, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet.task import Clock

from obdelta.builds.types import BuildCancelled
from obdelta.concurrency.watched_file import FileProblem
from obdelta.net.certificates import SOON
from obdelta.store.catalogue.records import FailureRow, Outcome
from obdelta.web.operators.health import Readiness
from obdelta.web.operators.pages.help_page import CHECKS, TOPICS
from obdelta.web.operators.pages.markup import fragment
from obdelta.web.operators.pages.sections.attention import (
    RECENT_SECONDS,
    attention,
    problems,
    title,
)
from tests.support.status_data import a_failure, known

NOW = 10_000_000.0
QUIET = known(now=NOW, problems={"upstream": None, "store": None}, failures=[])


def failed(outcome: Outcome, reason: str, age: float) -> FailureRow:
    row = a_failure(outcome, reason)
    return FailureRow(row.kind, row.base, row.target, outcome, reason, 1, int(NOW - age))


def quiet_but(**changed: object) -> list[str]:
    data = known(**{"now": NOW, "problems": {}, "failures": [], **changed})
    return [f"{one.severity}: {one.what}" for one in problems(data)]


@pytest_twisted.ensureDeferred
async def test_without_a_problem_the_block_is_hidden() -> None:
    assert problems(QUIET) == []
    html = await fragment(attention(QUIET))
    assert 'hidden="hidden"' in html and 'data-title="obdelta"' in html
    assert "/pages/icon.svg" in html


@pytest_twisted.ensureDeferred
async def test_errors_come_before_warnings_and_lead_to_help() -> None:
    data = known(
        now=NOW,
        problems={"upstream": "cannot connect", "other": "odd"},
        ages={"upstream": 3700.0},
        failures=[failed(Outcome.ERROR, "build worker: out of memory", 60)],
        certificates={"/a.pem": NOW - 1, "/b.pem": NOW + 3 * 86400, "/c.pem": NOW + 90 * 86400},
        store={"deltas": 3_000_000},
        quota=2_000_000,
    )
    found = problems(data)
    assert [one.severity for one in found] == ["error"] * 3 + ["warning"] * 3
    assert title(found) == "⚠ 6 problems · obdelta"
    assert found[0].since == NOW - 3700
    html = await fragment(attention(data))
    assert html.index("/a.pem") < html.index("out of memory") < html.index("/b.pem")
    assert "/c.pem" not in html
    assert "1.00 MB above its quota" in html
    assert "1 h ago" in html and "/pages/alert.svg" in html
    known_topics = {*CHECKS, *TOPICS, "other"}
    for one in found:
        page, _, topic = one.link.partition("#")
        assert page == "/deltas?state=failed" or (page == "/help" and topic in known_topics)


@pytest_twisted.ensureDeferred
async def test_a_part_that_fails_while_the_server_works_is_a_warning() -> None:
    clock, line = Clock(), [""]
    readiness = Readiness(clock)
    readiness.warnings.append(lambda: line[0])
    assert readiness.current_warnings() == {}
    line[0] = "Redis is unavailable"
    assert readiness.current_warnings() == {"Redis is unavailable": 0}
    clock.advance(30)
    found = readiness.current_warnings()
    (only,) = problems(known(now=NOW, problems={}, failures=[], warnings=found))
    assert (only.severity, only.what, only.since) == ("warning", line[0], NOW - 30)
    assert only.link.removeprefix("/help#") in TOPICS
    line[0] = ""
    assert readiness.current_warnings() == {}


def test_a_renewed_certificate_that_is_unusable_is_an_error() -> None:
    broken = FileProblem(Path("/a.key"), "it is not the key of /a.pem", 40.0)
    (only,) = problems(
        known(now=NOW, clock=100.0, problems={}, failures=[], unusable_files=[broken])
    )
    assert only.what == (
        "The new /a.key cannot be used: it is not the key of /a.pem: the old one stays in force"
    )
    assert (only.severity, only.since) == ("error", NOW - 60)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        (
            "auth-key",
            "The key file /f (auth-key) cannot be used: it broke: the old key stays in force",
        ),
        (
            "operator-passwords",
            "The file /f (operator-passwords) cannot be used: it broke: no one can log in",
        ),
    ],
)
def test_a_file_that_became_unusable_is_an_error(setting: str, what: str) -> None:
    broken = FileProblem(Path("/f"), "it broke", 40.0, setting)
    (only,) = problems(
        known(now=NOW, clock=100.0, problems={}, failures=[], unusable_files=[broken])
    )
    assert (only.severity, only.what, only.since) == ("error", what, NOW - 60)
    assert "the server reads it again by itself" in only.remedy
    assert only.link.removeprefix("/help#") in TOPICS


def test_failures_with_the_same_remedy_are_one_problem() -> None:
    rows = [failed(Outcome.ERROR, f"upstream registry: {n}", 100 + n) for n in range(3)]
    (only,) = problems(known(now=NOW, problems={}, failures=rows))
    assert only.what == "3 builds failed: upstream registry: 0"
    assert only.since == NOW - 102


def test_normal_verdicts_old_failures_and_cancelled_builds_need_no_attention() -> None:
    quiet = [
        failed(Outcome.TOO_LARGE, "the delta is too large", 1),
        failed(Outcome.UNUSABLE, "no delta can start", 1),
        failed(Outcome.ERROR, "upstream registry: gone", RECENT_SECONDS + 1),
        failed(Outcome.ERROR, str(BuildCancelled()), 1),
    ]
    assert quiet_but(failures=quiet) == []
    unproven = failed(Outcome.PROOF_FAILED, "layer 3", 1)
    assert quiet_but(failures=[*quiet, unproven]) == ["error: A build failed: layer 3"]
    edge = {"/a.pem": NOW + SOON}
    assert quiet_but(certificates=edge) == []


@pytest_twisted.ensureDeferred
async def test_the_age_of_a_problem_counts_from_its_first_report() -> None:
    clock, wrong = Clock(), ["gone"]

    async def problem() -> str | None:
        return wrong[0] if wrong else None

    readiness = Readiness(clock)
    readiness.add("upstream", problem)
    clock.advance(100)
    assert await readiness.problems() == {"upstream": "gone"}
    clock.advance(30)
    await readiness.problems()
    assert readiness.ages() == {"upstream": 30}
    wrong.clear()
    clock.advance(30)
    assert await readiness.problems() == {"upstream": None}
    assert readiness.ages() == {}
