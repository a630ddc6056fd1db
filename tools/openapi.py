"""``python -m tools.openapi``: writes the files that are made from
``obdelta/web/operators/openapi.yaml``.

These are ``openapi.json`` beside it (at run time no YAML is read), and the tables of
``docs/api.md``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "obdelta/web/operators/openapi.yaml"
MADE = SOURCE.with_suffix(".json")
PAGE = ROOT / "docs/api.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def converted(source: str) -> str:
    """Returns the description as JSON, without the YAML's merge keys and anchors."""
    return json.dumps(yaml.safe_load(source), indent=1, ensure_ascii=False) + "\n"


def table(source: str) -> str:
    """Returns the operations as Markdown tables, one for each tag."""
    description: dict[str, Any] = yaml.safe_load(source)
    lines = []
    for tag in description["tags"]:
        lines += [
            f"## {tag['name'].capitalize()}",
            "",
            f"{tag['description'][:1].upper()}{tag['description'][1:]}.",
            "",
        ]
        lines += ["| request | result | answers |", "|---|---|---|"]
        for path, item in description["paths"].items():
            for method, operation in item.items():
                if not isinstance(operation, dict) or tag["name"] not in operation.get("tags", ()):
                    continue
                query = "&".join(_query(description, operation))
                shown = f"`{method.upper()} {path}{'?' + query if query else ''}`"
                lines.append(
                    f"| {shown} | {operation['summary']} |"
                    f" {' '.join(sorted(operation['responses']))} |"
                )
        lines.append("")
    return "\n".join(lines)


def _query(description: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    found = []
    for parameter in operation.get("parameters", ()):
        named = parameter
        if "$ref" in parameter:
            named = description["components"]["parameters"][parameter["$ref"].rpartition("/")[2]]
        if named["in"] == "query":
            found.append(named["name"] + ("=" if named.get("required") else "=…"))
    return found


def page(text: str, source: str) -> str:
    """Returns the page with the present tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table(source) + END + after


if __name__ == "__main__":
    given = SOURCE.read_text("utf-8")
    MADE.write_text(converted(given), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8"), given), "utf-8")
