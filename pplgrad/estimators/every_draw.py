"""Estimators whose other draws have the law of the program's own, so that the costs may be differentiated at all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pplgrad.core.estimator import Estimator, arguments_of
from pplgrad.errors import ConfigurationError

_CHOICES = ("own", "all")


@dataclass(frozen=True)
class WithDrawsAlike(Estimator):
    """What these estimators share: a choice of the draws at which the costs are differentiated along the parameters that they contain."""

    differentiate: str = field(default="own", kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = _shown  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        if self.differentiate not in _CHOICES:
            raise ConfigurationError(
                f"{type(self).__name__}(differentiate={self.differentiate!r}): the draws at which the costs are differentiated are the program's "
                "'own', or 'all' that the estimator evaluates."
            )

    @property
    def differentiates_all(self) -> bool:
        """Whether the costs are differentiated at all draws."""
        return self.differentiate == "all"


def _shown(estimator: Any) -> str:
    """Return how a dataclass prints itself, without what is given by its keyword alone and has its default."""
    every = [part for part in arguments_of(estimator) if part.repr]
    given = {part.name: getattr(estimator, part.name) for part in every}
    at_default = {part.name for part in every if part.kw_only is True and given[part.name] == part.default}
    shown = [f"{name}={value!r}" for name, value in given.items() if name not in at_default]
    return f"{type(estimator).__qualname__}({', '.join(shown)})"
