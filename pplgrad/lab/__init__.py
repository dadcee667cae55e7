"""The laboratory: compare estimators on a model script. Uses the plug-ins through their public interface only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pplgrad._extras import without

if TYPE_CHECKING:
    from pplgrad.lab.dataset import StudyData, load_study
    from pplgrad.lab.plots import plot_bias, plot_training, plot_variance

__all__ = ["StudyData", "load_study", "plot_bias", "plot_training", "plot_variance"]
_ROOMS = {"StudyData": "dataset", "load_study": "dataset"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: pandas and matplotlib are there with the extra `research` alone."""
    if name not in __all__:
        raise AttributeError(f"module 'pplgrad.lab' has no attribute {name!r}")
    try:
        return getattr(import_module(f"pplgrad.lab.{_ROOMS.get(name, 'plots')}"), name)
    except ModuleNotFoundError as error:
        raise without(error, f"pplgrad.lab.{name}", "research", "matplotlib", "pandas", "pyarrow") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
