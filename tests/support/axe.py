"""axe-core, the accessibility checker, in a browser's page."""

from __future__ import annotations

from pathlib import Path

from selenium.webdriver import Chrome

_AXE = Path(__file__).parent.parent / "node/node_modules/axe-core/axe.min.js"

SECONDS = 200.0
"""A page's time, on a busy machine."""


def violations(driver: Chrome, *, contrast: bool = True) -> list[str]:
    """Returns what axe-core finds on the open page: one line for each element and rule. The
    contrast of each text is by far the most expensive rule.
    """
    driver.set_script_timeout(SECONDS)
    driver.execute_script(_AXE.read_text("utf-8"))
    found = driver.execute_async_script(
        "const [contrast, done] = arguments;"
        "axe.run(document, {rules: {'color-contrast': {enabled: contrast}}})"
        ".then((result) => done(result.violations))",
        contrast,
    )
    return [
        f"{rule['id']}: {node['html'][:200]}: {node['failureSummary']}"
        for rule in found
        for node in rule["nodes"]
    ]
