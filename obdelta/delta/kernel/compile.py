"""Compiles the C kernel (cffi, API mode). ``setup.py`` names :data:`ffibuilder`."""

import re
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent
_SOURCES = (
    "kernel.c",
    "tar.c",
    "stream.c",
    "sampled_index.c",
    "block_matches.c",
    "exact_match.c",
    "search/match.c",
    "search/anchors.c",
    "search/dense.c",
    "search/windows.c",
    "search/diagonals.c",
    "plan/cheapest_path.c",
    "plan/price.c",
    "plan/commands.c",
    "plan/known_spans.c",
    "report.c",
)


def _declarations() -> str:
    """Returns the header's declarations for cffi: the part between the CDEF lines, without the
    values of constants, which the compiler fills in.
    """
    header = (_HERE / "kernel.h").read_text("ascii")
    part = header.partition("/* CDEF begins */")[2].partition("/* CDEF ends */")[0]
    return re.sub(r"^(#define \w+) [^/\n]+", r"\1 ...", part, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "obdelta.delta.kernel._kernel_cffi",
    '#include "kernel.h"',
    # setuptools needs paths relative to setup.py to build a source distribution.
    sources=[f"obdelta/delta/kernel/{name}" for name in _SOURCES],
    include_dirs=["obdelta/delta/kernel"],
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra"],
)
