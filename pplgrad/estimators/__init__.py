"""Estimators: one file for each family. The mathematics only; nothing here knows Pyro or NumPyro."""

from pplgrad.core.alternatives import Alternatives
from pplgrad.core.estimator import Declaration, Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.estimators.antithetic import ARM, ARMS, DisARM
from pplgrad.estimators.antithetic_categorical import CARMS, StickBreakingDisARM, TreeDisARM
from pplgrad.estimators.auto import Auto
from pplgrad.estimators.control_variates import REBAR, DoubleCV, MuProp
from pplgrad.estimators.count_difference import CountDifference
from pplgrad.estimators.count_relaxations import TruncatedGumbelSoftmax
from pplgrad.estimators.enumerate import Enumerate
from pplgrad.estimators.local_expectation import LocalExpectation
from pplgrad.estimators.measure_valued import MeasureValued
from pplgrad.estimators.mirrored import Mirrored
from pplgrad.estimators.mixtures import ImplicitReparam, StratifiedMixture
from pplgrad.estimators.multi_sample import OVIS, VIMCO, DReG
from pplgrad.estimators.registry import register
from pplgrad.estimators.relax import RELAX
from pplgrad.estimators.relaxed import GappedStraightThrough, GumbelRao, GumbelSoftmax, ReinMax, StraightThrough
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction
from pplgrad.estimators.stein import RODEO
from pplgrad.estimators.subset_relaxations import IMLE, SIMPLE
from pplgrad.estimators.without_replacement import SumAndSample, UnorderedSet

__all__ = [
    "ARM",
    "ARMS",
    "Alternatives",
    "Auto",
    "CARMS",
    "CountDifference",
    "DReG",
    "Declaration",
    "DisARM",
    "DoubleCV",
    "Enumerate",
    "Estimator",
    "GappedStraightThrough",
    "GumbelRao",
    "GumbelSoftmax",
    "IMLE",
    "ImplicitReparam",
    "LocalExpectation",
    "MeasureValued",
    "Mirrored",
    "MuProp",
    "OVIS",
    "REBAR",
    "RELAX",
    "RODEO",
    "SIMPLE",
    "ReinMax",
    "Reparam",
    "ScoreFunction",
    "SiteInfo",
    "StickBreakingDisARM",
    "StraightThrough",
    "StratifiedMixture",
    "SumAndSample",
    "TreeDisARM",
    "TruncatedGumbelSoftmax",
    "UnorderedSet",
    "VIMCO",
]

register(*(kind for name in __all__ if issubclass(kind := globals()[name], Estimator) and kind is not Estimator))
