"""What is said where a package of an extra is not installed."""

from __future__ import annotations


def without(error: ModuleNotFoundError, what: str, extra: str, *packages: str) -> ModuleNotFoundError:
    """Return the error to raise: with the remedy where a package of an extra is missing, as it came where another module is."""
    missing = (error.name or "").partition(".")[0]
    if missing not in packages:
        return error
    return ModuleNotFoundError(
        f"{what} needs {missing}, which is not installed; pip install 'pplgrad[{extra}]'.", name=missing
    )
