"""`make fuzz`, for a short time: the kernel under AddressSanitizer and UBSan with inputs that
libFuzzer finds.

The stream reader must stay inside its buffers and give the same result however a stream is cut. A
plan's stream must produce the target. Where memory ends, every function reports it. A minute in
all.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = sorted(path.stem for path in (ROOT / "tests/fuzz").glob("*.c"))
SECONDS = {"memory": 10}


@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzz_targets_find_no_fault(target: str) -> None:
    ran = subprocess.run(
        [ROOT / "tools/fuzz", str(SECONDS.get(target, 25)), target],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Done " in ran.stdout
