"""``$filter`` of OData: conditions on rows, for the double of openBalena's API."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
Bindings = dict[str, tuple[str, Row]]
"""The table and the row behind each name in a condition."""
Condition = Callable[[Bindings], bool]
Related = Callable[[str, Row, str], tuple[str, list[Row]]]
"""Returns the table and the rows to which a relation of a row leads."""
_WORD = re.compile(
    r"\s*(?:(datetime)?'((?:[^']|'')*)'|([A-Za-z_][\w/]*(?:/any(?=\())?)|(\d+)|([(),:]))"
)


class Filter:
    """A parser of ``$filter``: comparisons, ``in``, ``and``, ``or``, brackets and ``any``."""

    def __init__(self, related: Related, text: str) -> None:
        self._related, self._words = related, list(_words(text))

    def parsed(self) -> Condition:
        """Returns the condition that the text means."""
        condition = self._or()
        assert not self._words, f"not understood: {self._words}"
        return condition

    def _take(self, *wanted: Any) -> Any:
        word = self._words.pop(0)
        assert not wanted or word in wanted, f"{word} instead of {wanted}"
        return word

    def _or(self) -> Condition:
        parts = [self._and()]
        while self._words and self._words[0] == "or":
            self._take()
            parts.append(self._and())
        return lambda bound: any(part(bound) for part in parts)

    def _and(self) -> Condition:
        parts = [self._one()]
        while self._words and self._words[0] == "and":
            self._take()
            parts.append(self._one())
        return lambda bound: all(part(bound) for part in parts)

    def _one(self) -> Condition:
        word = self._take()
        if word == "(":
            condition = self._or()
            self._take(")")
            return condition
        if word.endswith("/any"):
            return self._any(word.removesuffix("/any"))
        operation = self._take("eq", "ne", "gt", "ge", "in")
        if operation == "in":
            self._take("(")
            values = [self._literal()]
            while self._take(",", ")") == ",":
                values.append(self._literal())
            return lambda bound: self._value(bound, word) in values
        value = self._literal()
        compare: Callable[[Any], bool] = {
            "eq": lambda found: found == value,
            "ne": lambda found: found != value,
            "gt": lambda found: found is not None and found > value,
            "ge": lambda found: found is not None and found >= value,
        }[operation]
        return lambda bound: compare(self._value(bound, word))

    def _any(self, path: str) -> Condition:
        self._take("(")
        alias = self._take()
        self._take(":")
        inside = self._or()
        self._take(")")

        def found(bound: Bindings) -> bool:
            table, row, name = self._place(bound, path)
            other, rows = self._related(table, row, name)
            return any(inside({**bound, alias: (other, one)}) for one in rows)

        return found

    def _literal(self) -> Any:
        word = self._take()
        if isinstance(word, tuple):
            return word[0]
        return {"true": True, "false": False, "null": None}[word] if isinstance(word, str) else word

    def _place(self, bound: Bindings, path: str) -> tuple[str, Row, str]:
        alias, _, name = path.rpartition("/")
        table, row = bound[alias]
        return table, row, name

    def _value(self, bound: Bindings, path: str) -> Any:
        _, row, name = self._place(bound, path)
        return row["application"] if name == "belongs_to__application" else row[name]


def _words(text: str) -> Iterator[Any]:
    place = 0
    while place < len(text.rstrip()):
        match = _WORD.match(text, place)
        assert match, f"not understood: {text[place:]}"
        place = match.end()
        _date, quoted, word, number, mark = match.groups()
        if quoted is not None:
            yield (quoted.replace("''", "'"),)
        else:
            yield int(number) if number else word or mark
