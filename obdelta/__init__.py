"""obdelta: delta updates for openBalena devices, built on demand by a streaming registry proxy."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("obdelta")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
