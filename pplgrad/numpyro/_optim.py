"""An optimizer made of two: the user's for the program, and another for learned baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from numpyro.optim import optax_to_numpyro

from pplgrad.numpyro._baselines import is_baseline_param
from pplgrad.numpyro._compat import NumPyroOptim

if TYPE_CHECKING:
    from optax import GradientTransformation


def split_optimizer(
    main: NumPyroOptim | GradientTransformation,
    baseline: NumPyroOptim | GradientTransformation,
    *,
    belongs: Callable[[str], bool] = is_baseline_param,
) -> NumPyroOptim:
    """Return an optimizer that trains learned baselines with `baseline` and everything else with `main`.

    Clipping by a global norm is applied within each of the two. It estimates nothing.

    Args:
        main: an optimizer of `numpyro.optim` or of optax, for the program's parameters.
        baseline: the same, for the parameters of learned baselines.
        belongs: function from a parameter's name to whether `baseline` trains it. Default: `is_baseline_param`.

    Returns:
        A NumPyro optimizer.

    Shapes:
        Those of the parameters.

    Raises:
        TypeError: one of them is neither an optimizer of `numpyro.optim` nor of optax.

    Example:
        >>> from numpyro.optim import Adam
        >>> optimizer = split_optimizer(Adam(1e-3), Adam(1e-2))
        >>> sorted(optimizer.get_params(optimizer.init({"a": 1.0, "z$pplgrad.0": 2.0})))
        ['a', 'z$pplgrad.0']

    References:
        Mnih and Gregor (2014), section 2.6, where the baseline has a learning rate of its own.
    """
    return SplitOptimizer(_as_numpyro(main), _as_numpyro(baseline), belongs)


class SplitOptimizer(NumPyroOptim):
    """A NumPyro optimizer made of two, each with its own part of the parameters."""

    def __init__(
        self, main: NumPyroOptim, baseline: NumPyroOptim, belongs: Callable[[str], bool] = is_baseline_param
    ) -> None:
        self.main = main
        self.baseline = baseline
        self._belongs = belongs
        with_value = main.update_with_value or baseline.update_with_value
        super().__init__(lambda: (self._init, self._update, self._get_params), update_with_value=with_value)

    def _init(self, params: dict) -> tuple:
        ours, learned = self._split(params)
        return self.main.init(ours)[1], self.baseline.init(learned)[1]

    def _update(self, i: jax.Array, gradient: dict, state: tuple, value: Any = None) -> tuple:
        # Each one's own `update`, where the clipping optimizers clip.
        ours, learned = self._split(gradient)
        main = self.main.update(ours, (i, state[0]), value=value)
        return main[1], self.baseline.update(learned, (i, state[1]), value=value)[1]

    def _get_params(self, state: tuple) -> dict:
        return {**self.main.get_params((0, state[0])), **self.baseline.get_params((0, state[1]))}

    def _split(self, params: dict) -> tuple[dict, dict]:
        ours = {name: value for name, value in params.items() if not self._belongs(name)}
        return ours, {name: value for name, value in params.items() if self._belongs(name)}


def _as_numpyro(optimizer: Any) -> NumPyroOptim:
    if isinstance(optimizer, NumPyroOptim):
        return optimizer
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optax_to_numpyro(optimizer)
    raise TypeError(f"split_optimizer takes optimizers of numpyro.optim or optax; got {type(optimizer).__name__}.")
