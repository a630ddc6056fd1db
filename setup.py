"""Only what setup.cfg cannot say: the C kernel is compiled by cffi in API mode."""

from setuptools import setup

setup(cffi_modules=["obdelta/delta/kernel/compile.py:ffibuilder"])
