"""``python -m tools.openapi``: writes ``obdelta/web/openapi.json`` from ``openapi.yaml``; at run time no YAML is read."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

SOURCE = Path(__file__).parent.parent / "obdelta/web/openapi.yaml"
MADE = SOURCE.with_suffix(".json")


def converted(source: str) -> str:
    """The same description as JSON, without the YAML's merge keys and anchors."""
    return json.dumps(yaml.safe_load(source), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    MADE.write_text(converted(SOURCE.read_text("utf-8")), "utf-8")
