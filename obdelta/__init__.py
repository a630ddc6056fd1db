"""obdelta: delta updates for openBalena devices, built on demand by a streaming registry proxy."""

__all__ = ["__version__"]

__version__: str


def __getattr__(name: str) -> str:
    """Returns the version. The lookup is lazy, so that worker processes start in half the time."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("obdelta")
    except PackageNotFoundError:  # a checkout that was never installed
        found = "0+unknown"
    globals()[name] = found
    return found
