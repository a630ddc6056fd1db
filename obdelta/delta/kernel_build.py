"""Compiles the C kernel (cffi, API mode). ``setup.py`` names :data:`ffibuilder`."""

import re
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent
_SOURCES = (
    "_kernel.c",
    "_tar.c",
    "_stream.c",
    "_coarse.c",
    "_blocks.c",
    "_same.c",
    "_match.c",
    "_price.c",
    "_parse.c",
    "_explain.c",
)


def _declarations() -> str:
    """What the header promises, as cffi reads it: the part between the CDEF lines, values of constants left to the compiler."""
    header = (_HERE / "_kernel.h").read_text("ascii")
    part = header.partition("/* CDEF begins */")[2].partition("/* CDEF ends */")[0]
    return re.sub(r"^(#define \w+) [^/\n]+", r"\1 ...", part, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "obdelta.delta._kernel_cffi",
    '#include "_kernel.h"',
    # setuptools wants paths from setup.py on, for a source distribution to build.
    sources=[f"obdelta/delta/{name}" for name in _SOURCES],
    include_dirs=["obdelta/delta"],
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra"],
)
