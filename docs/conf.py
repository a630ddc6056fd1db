"""Sphinx configuration for the documentation site (`make docs`)."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

_setup = configparser.ConfigParser()
_setup.read(Path(__file__).parent.parent / "setup.cfg")

project = "obdelta"
release = version = _setup["metadata"]["version"]
copyright = "the authors of obdelta, Apache License 2.0"
extensions = ["myst_parser"]
exclude_patterns = ["news"]
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_block"]
# A broken link to a page or a heading is a warning, which `make docs` and the tests turn into an
# error.
nitpicky = True
# Sketches of interfaces have an ellipsis here and there.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"obdelta {release}"
html_static_path = ["_static"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def _name_every_page(app: Any, page: str, source: list[str]) -> None:
    """Pages that index.md does not name yet come last, so that none is left out."""
    rest = sorted(
        name for name in app.env.found_docs if name != "index" and f"\n{name}\n" not in source[0]
    )
    if page == "index" and rest:
        source[0] += "\n```{toctree}\n:caption: More\n:hidden:\n\n" + "\n".join(rest) + "\n```\n"


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", _name_every_page)
