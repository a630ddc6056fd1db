"""Names, docstrings and comments use the field's words: no linter reads them for terms."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TERMS = ROOT / "tools/prose/terms.yml"
FOLDERS = ("obdelta", "bench", "tools", "tests")
# Words of tools/prose/terms.yml that names used, and more: `MOST_` is now a limit.
FORBIDDEN = frozenset(
    [
        "afresh",
        "anew",
        "asked",
        "asker",
        "caught",
        "coordinator",
        "face",
        "heal",
        "least",
        "most",
        "noted",
        "relatives",
        "said",
        "spool",
        "tell",
        "theirs",
        "told",
        "whoever",
    ]
)
ALLOWED = frozenset(("most",))  # a parameter: at most so many


def names(source: str) -> Iterator[str]:
    """Yields the names of functions, classes, parameters, variables and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def forbidden(source: str) -> set[str]:
    """Returns the names with a forbidden word."""
    return {
        name
        for name in names(source)
        if name.lstrip("_") not in ALLOWED
        and FORBIDDEN.intersection(
            word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
        )
    }


def modules(folder: str) -> Iterator[Path]:
    """Yields the modules of a directory that are ours."""
    return (path for path in (ROOT / folder).rglob("*.py") if "node_modules" not in path.parts)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_are_words_of_the_field(folder: str) -> None:
    found = {
        str(module.relative_to(ROOT)): bad
        for module in modules(folder)
        if (bad := forbidden(module.read_text("utf-8")))
    }
    assert not found


def test_names_of_tests_begin_with_a_subject() -> None:
    found = {
        f"{module.relative_to(ROOT)}: {name}"
        for module in modules("tests")
        for name in names(module.read_text("utf-8"))
        if re.match(r"test_(what|who|whom|whose|of|nobody|somebody)_", name)
    }
    assert not found


def test_a_forbidden_name_is_found() -> None:
    source = "MOST_ROWS = 1\ndef ask_told(asker, most): self.noted = ShownSpool\nclass AsFace: ..."
    assert forbidden(source) == {"MOST_ROWS", "ask_told", "asker", "noted", "AsFace"}


@functools.cache
def terms() -> dict[re.Pattern[str], str]:
    """Returns the patterns of the prose linter's list of terms, and what to write instead."""
    found = {}
    for rule in yaml.safe_load(TERMS.read_text("utf-8"))["rules"]:
        for pattern in rule.get("patterns", [rule.get("pattern")]):
            _, body, flags = pattern.split("/", 2) if pattern.count("/") == 2 else ("", "", "")
            assert body, f"cannot read {pattern}"
            found[re.compile(body, re.IGNORECASE if "i" in flags else 0)] = rule["expected"]
    return found


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yields comments and docstrings (of attributes too), each in one line, without their code."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            value = each.value if isinstance(each, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield each.lineno, " ".join(re.sub(r"``[^`]*``", "code", value.value).split())


def unclear(source: str) -> list[str]:
    """Returns the places whose words have a standard term."""
    return [
        f"line {line}: {match[0]!r}: write {expected!r}: {text[:80]}"
        for line, text in prose(source)
        for pattern, expected in terms().items()
        if (match := pattern.search(text))
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_comments_use_standard_terms(folder: str) -> None:
    found = {
        str(module.relative_to(ROOT)): bad
        for module in modules(folder)
        if (bad := unclear(module.read_text("utf-8")))
    }
    assert not found


def test_unclear_words_are_found() -> None:
    source = '''
"""Of the module."""
LIMIT = 1
"""What a client gets."""


class One:
    """Whoever asks. ``nobody`` is code."""

    # The peer's files lie in one folder.
'''
    found = unclear(source)
    assert [line.split(":")[0] for line in found] == [
        "line 10",
        "line 10",
        "line 2",
        "line 4",
        "line 8",
    ]
