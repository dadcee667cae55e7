"""A baseline that a network learns by regression, and a baseline that a user's function computes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pplgrad.baselines.average import check_decay
from pplgrad.baselines.running import average_shapes, read_averages, update_averages
from pplgrad.core.array_ops import Array
from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation
from pplgrad.core.plates import Plate
from pplgrad.errors import ConfigurationError

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class NeuralBaseline(Baseline):
    r"""A learned baseline (as in NVIL): a network that predicts the downstream cost from quantities known before the draw.

    Estimates b(x) = E[f | x] by least squares. The loss Σ (f − b(x))², in which f is a constant, is added to the objective's loss. Its
    gradient reaches the parameters of the network only. These parameters are stored with the user's own; `split_optimizer` gives them a
    separate learning rate.

    Args:
        net: the network. In Pyro a `torch.nn.Module`; in NumPyro a flax linen or nnx module, an equinox module, or a pair (init, apply)
            with init(key, x) and apply(parameters, x). None builds a network with the `hidden` sizes, tanh between them, and a last layer
            that is initialised to zero. Default: None.
        inputs: a function of the program's arguments, whose value is the network's input, of shape (*plates, features). If it has a
            keyword argument `sites`, it also receives the values of the latent sites, by name, and may read upstream sites only. None
            uses the array arguments whose leading dimensions are the site's plates; without any such argument the network is one learned
            number. Default: None.
        hidden: the sizes of the hidden layers of the default network. Default: (64,).
        normalize_variance: whether the signal is divided by max(1, standard deviation of past signals), where the moments are decaying
            averages. The site's gradient is then unbiased up to that positive factor. Default: False.
        decay: the decay of these averages, in [0, 1). Default: 0.9.
        share: "none": each site has a network of its own, and those of sites with the same inputs are evaluated in one product. "loop": sites
            whose names differ in their numbers alone, such as `z_1` and `z_2`, have one network, which gets log(1 + number) as further
            inputs. It has fewer parameters and is fitted to more costs. Its name has `*` in the place of the numbers. Default: "none".

    Shapes:
        The output must have one number for each element of the site's plates, with or without a last dimension of 1. In nats.

    Assumptions:
        The inputs do not depend on the site's own draw. Inputs that read it, or anything computed from it, are refused.

    Raises:
        BaselineError: if the inputs read the site's own value or anything computed from it; if the output has a wrong shape or is NaN.
        ConfigurationError: if `decay` is outside [0, 1), `inputs` is not callable, or `share` is neither "none" nor "loop".

    Example:
        >>> NeuralBaseline(hidden=(32,), share="loop").owner("z_12")
        'z_*'

    References:
        Mnih and Gregor (2014), sections 2.3 and 2.4 (NVIL), equations 8 to 11.
    """

    net: Any = None
    inputs: Callable[..., Any] | None = None
    hidden: Sequence[int] = (64,)
    normalize_variance: bool = False
    decay: float = 0.9
    share: str = "none"

    per_site: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    calls_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_decay("NeuralBaseline", self.decay)
        if self.inputs is not None and not callable(self.inputs):
            raise ConfigurationError(
                "NeuralBaseline(inputs=...) takes a function of the program's arguments, such as lambda x: x; "
                f"got {type(self.inputs).__name__}."
            )

        if self.share not in ("none", "loop"):
            raise ConfigurationError(f"NeuralBaseline(share={self.share!r}): write 'none' or 'loop'.")

    def owner(self, site: str) -> str:
        """Return the name under which a site's network is kept: the site's own, or what the sites of its loop have in common."""
        return _NUMBER.sub("*", site) if self.share == "loop" else site

    def numbers(self, site: str) -> list[float]:
        """Return what a shared network is told of the site: log(1 + n) of each number in its name."""
        return [math.log1p(int(found)) for found in _NUMBER.findall(site)] if self.share == "loop" else []

    @property
    def normalizes(self) -> bool:
        """Return whether the variance is normalised."""
        return self.normalize_variance

    @property
    def takes_sites(self) -> bool:
        """Whether several sites are evaluated at once: not where each normalises its own signal."""
        return type(self) is NeuralBaseline and not self.normalize_variance

    def state_shapes(self, plates: Sequence[Plate]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the signal's running moments, if the variance is normalised."""
        return average_shapes(["mean", "square"], plates, False) if self.normalize_variance else {}

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the prediction as a constant, the squared error, and the new running moments."""
        xp, ops = terms.ops.xp, terms.ops
        predicted = terms.predict()
        error = terms.cost - predicted
        state: Mapping[str, Array] = {}
        if self.normalize_variance:
            signal = ops.stop_gradient(error)
            state = update_averages(terms, {"mean": signal, "square": signal**2}, self.decay, False)
        return Evaluation(ops.stop_gradient(predicted), xp.sum(error**2), state)

    def rescale(self, terms: BaselineTerms, signal: Array) -> Array:
        """Divide the signal by the standard deviation of past signals where that is above one."""
        if not self.normalize_variance:
            return signal
        xp = terms.ops.xp
        mean, square = read_averages(terms, ["mean", "square"], False)
        variance = square - mean**2
        one = xp.ones_like(variance)
        return signal / xp.sqrt(xp.where(variance > 1, variance, one))


@dataclass(frozen=True, eq=False)
class FunctionBaseline(Baseline):
    r"""A baseline that is computed by a user's function of quantities known before the draw.

    The baseline is b = function(*args, **kwargs), called with the program's arguments. If the function has a keyword argument `sites`, it
    also receives the values of the latent sites, by name, and may read upstream sites only. The value of the function is a constant to
    differentiation.

    Args:
        function: the function of the program's arguments.

    Shapes:
        The value must broadcast to (particles, *plates). In nats.

    Assumptions:
        The function does not depend on the site's own draw. A function that reads it, or anything computed from it, is refused.

    Raises:
        BaselineError: if the function reads the site's own value or anything computed from it; if it returns a wrong shape or NaN.
        ConfigurationError: if `function` is not callable.

    Example:
        >>> FunctionBaseline(lambda x: x.sum(-1)).learned
        False

    References:
        Mohamed, Rosca, Figurnov and Mnih (2020), section 7.4 (baselines).
    """

    function: Callable[..., Any]
    per_site: ClassVar[bool] = True
    calls_function: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigurationError(
                f"FunctionBaseline takes a function of the program's arguments; got {type(self.function).__name__}."
            )

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the function's value as a constant."""
        return Evaluation(terms.ops.stop_gradient(terms.predict()), None, {})
