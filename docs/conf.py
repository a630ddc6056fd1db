"""Sphinx configuration for the documentation site (`make docs`)."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.search.en import SearchEnglish

from obdelta import __version__

project = "obdelta"
release = version = __version__
copyright = "the authors of obdelta, Apache License 2.0"
extensions = ["myst_parser", "sphinx_copybutton"]
copybutton_prompt_text = "$ "
# Of fences without a language, such as drawings. For indented blocks see _colour_commands.
highlight_language = "text"
templates_path = ["_templates"]
exclude_patterns = ["news", "_templates"]
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


def _colour_commands(_app: Any, page: nodes.document) -> None:
    """Indented blocks are commands, most of them; MyST gives them no language."""
    for block in page.findall(nodes.literal_block):
        if block.get("language") == "none":
            block["language"] = "sh"


class EnglishWithNumbers(SearchEnglish):
    """Sphinx leaves numbers out of its index, and so statuses and ports."""

    def word_filter(self, word: str) -> bool:
        return word.isdigit() or super().word_filter(word)


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("doctree-read", _colour_commands)
    app.add_search_language(EnglishWithNumbers)
    # Deferred: it changes Sphinx's search after that was loaded, and before it starts.
    app.add_js_file("site.js", loading_method="defer")
    app.connect("source-read", _name_every_page)
