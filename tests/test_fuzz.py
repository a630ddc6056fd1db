"""`make fuzz`, for a short while: the kernel under AddressSanitizer and UBSan with inputs that
libFuzzer finds.

The stream reader must end inside its buffers and say the same however a stream is cut; a plan's
stream must make the target; where memory ends, everything says so. A minute in all.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.c"))
SECONDS = {"memory": 10}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str) -> None:
    ran = subprocess.run(
        [ROOT / "tools/fuzz", str(SECONDS.get(target, 25)), target],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Done " in ran.stdout
