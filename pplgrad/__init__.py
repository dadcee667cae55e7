"""pplgrad: every latent sample site of a Pyro or NumPyro program names its own gradient estimator.

The specifications live here and are the same for both libraries; `pplgrad.pyro` and `pplgrad.numpyro` hold the
ELBO and the guide wrapper of each. Importing this package imports neither torch nor jax.
"""

from pplgrad.baselines import (
    Baseline,
    Constant,
    DecayingAverage,
    FunctionBaseline,
    LeaveOneOut,
    NeuralBaseline,
    OptimalConstant,
)
from pplgrad.errors import (
    BaselineError,
    ConfigurationError,
    EstimatorError,
    ImpossibleValueError,
    PplgradError,
    ProgramError,
)
from pplgrad.estimators import (
    ARM,
    ARMS,
    REBAR,
    Auto,
    DisARM,
    DoubleCV,
    Estimator,
    GappedStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ReinMax,
    Reparam,
    ScoreFunction,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
)
from pplgrad.objectives import ELBO, Expectation, Objective

__all__ = [
    "ARM",
    "ARMS",
    "Auto",
    "Baseline",
    "BaselineError",
    "ConfigurationError",
    "Constant",
    "DecayingAverage",
    "DisARM",
    "DoubleCV",
    "ELBO",
    "Estimator",
    "EstimatorError",
    "Expectation",
    "FunctionBaseline",
    "GappedStraightThrough",
    "GumbelRao",
    "GumbelSoftmax",
    "ImpossibleValueError",
    "LeaveOneOut",
    "LocalExpectation",
    "MeasureValued",
    "MuProp",
    "NeuralBaseline",
    "Objective",
    "OptimalConstant",
    "PplgradError",
    "ProgramError",
    "REBAR",
    "ReinMax",
    "Reparam",
    "ScoreFunction",
    "StraightThrough",
    "SumAndSample",
    "UnorderedSet",
]
