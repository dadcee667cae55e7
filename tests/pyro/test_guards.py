"""What a program reads may change between two steps, however it is held: an ELBO never goes by what it was."""

import copy
import io
import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pplgrad import LocalExpectation, NeuralBaseline, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.pyro._reuse.guards import _VISITS, Guard
from pplgrad.testing.in_pyro import HOST, fresh
from pplgrad.testing.programs import CASES
from tests.pyro.changing import EVERYTHING, OBSERVED, START, guide, model_of
from tests.pyro.compiling import CHEAP, graphs

MOVING = ("iterator", "count", "np.random.Generator", "random.Random", "RandomState")
"""These move at every step, whichever ELBO takes it."""


def names(every):
    return [f"{kind}: {name}" for kind, cases in every for name, *_ in cases()]


def found(elbo, model):
    """Return the exact gradient that an ELBO has of a model."""
    pyro.param("l", START)
    elbo_leaf().grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elbo.loss_and_grads(model, guide)
    return elbo_leaf().grad.clone()


def elbo_leaf():
    return dict(pyro.get_param_store().named_parameters())["l"]


@pytest.mark.grid
@pytest.mark.parametrize("compiled", [False, CHEAP], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", names(EVERYTHING))
def test_what_a_program_reads_is_never_stale(name, compiled):
    kind, _, case = name.partition(": ")
    read, change = {each: rest for each, *rest in dict(EVERYTHING)[kind]()}[case]
    model = model_of(read)
    pyro.clear_param_store()
    kept = TraceGrad_ELBO(estimators={"z*": LocalExpectation()}, compile=compiled)
    if case in MOVING:
        assert Guard.of(model) is None
        return
    for _ in range(5):
        before = found(kept, model)
    undo = change()
    try:
        seen = found(kept, model)
        right = found(TraceGrad_ELBO(estimators={"z*": LocalExpectation()}), model)
        torch.testing.assert_close(seen, right, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(before, right), "the change must be one that a gradient shows"
    finally:
        if isinstance(undo, FunctionType):
            undo()


# What must still be reused.


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.offset = PyroSample(dist.Normal(0.0, 1.0))
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.linear(x)[..., 0] + self.offset, self.scale), obs=x[:, 0])


@dataclass(frozen=True)
class Sizes:
    width: int = 3
    names: tuple = ("a", "b")
    weights: torch.Tensor = field(default_factory=lambda: torch.ones(3))


def simple(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:, 0])


def reused():
    """Yield (name, model, guide) of programs that are reused, each of them after a call of its guide."""
    net, sizes, rates = (
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.1)),
        Sizes(),
        {"a": 1.0},
    )

    def closure(x):
        with poutine.scale(scale=rates["a"]), poutine.mask(mask=torch.tensor(True)):
            z = pyro.sample("z", dist.Normal(math.sqrt(sizes.width) * sizes.weights.sum(), 1.0))
        pyro.sample("y", dist.Normal(net(x).mean() + torch.nn.functional.softplus(z), 1.0), obs=torch.tensor(START_AT))

    def plain(x):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), np.sqrt(2.0)))

    yield "closures", closure, plain
    yield "partial", partial(closure), partial(plain)
    baseline = NeuralBaseline(nn.Linear(2, 1), inputs=lambda x: x[0])
    yield "configured", closure, config_estimators(plain, {"z": ScoreFunction(baseline=baseline)})
    for handler in (partial(poutine.scale, scale=2.0), partial(poutine.block, hide=["q"]), config_enumerate):
        yield "handler", handler(closure), plain
    yield "conditioned", poutine.condition(closure, data={"y": torch.tensor(0.2)}), plain
    for kind in (AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal):
        yield kind.__name__, simple, kind(simple)
        yield f"configured {kind.__name__}", simple, config_estimators(kind(simple), {})
    listed = AutoGuideList(simple)
    listed.append(AutoNormal(poutine.block(simple, expose=["z"])))
    yield "AutoGuideList", simple, listed
    regression = Regression()
    yield "PyroModule", regression, AutoNormal(regression)


START_AT = 0.7


@pytest.mark.parametrize("index", range(17))
def test_a_program_that_stays_the_same_is_reused(index):
    every = list(reused())
    assert len(every) == 17
    _, model, guide = every[index]
    x = torch.ones(3, 2)
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO()
    for _ in range(3):
        elbo.loss_and_grads(model, guide, x)
    assert Guard.reason(model, guide) == ""
    guard = Guard(model, guide)
    for _ in range(2):
        elbo.loss_and_grads(model, guide, x)
        assert guard.holds()


@pytest.mark.parametrize("name", CASES)
def test_programs_of_the_tests_are_reused(name):
    fresh(CASES[name])
    model, guide = CASES[name].build(HOST)
    guard = Guard.of(model, guide)
    assert guard is not None
    assert guard.holds()


class Factor:
    """A class of the program's own, which nothing has pickled before."""

    def __init__(self):
        self.value = torch.tensor(2.0)


def test_pickling_changes_no_program():
    """Python notes in a class how its objects are pickled, at the first `torch.save` or `deepcopy`; a training goes on as it was."""
    for kind in (Factor, torch.Tensor, nn.Parameter, nn.Module):
        if "__slotnames__" in vars(kind):
            del kind.__slotnames__
    factor = Factor()
    guard = Guard.of(lambda x: factor.value * x)
    assert guard.holds()
    torch.save(factor.value, io.BytesIO())
    copy.deepcopy(factor)
    assert "__slotnames__" in vars(Factor) and "__slotnames__" in vars(torch.Tensor) and guard.holds()
    Factor.more = 1
    assert not guard.holds()
    del Factor.more


def test_a_recorded_step_never_keeps_numpys_draws():
    """The global generators are compared over a recording, whatever way a draw was hidden."""
    hidden_in_a_library = type(pyro.sample)(
        (lambda: float(np.random.rand())).__code__, {"__name__": "torch", "np": np, "float": float}
    )
    model = model_of(lambda: hidden_in_a_library() < 2)
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"z*": ScoreFunction()}, compile=CHEAP)
    with pytest.warns(UserWarning, match="reads random numbers of Python or NumPy"):
        for _ in range(4):
            elbo.loss_and_grads(model, guide)
    assert graphs(elbo) == 0


@pytest.mark.parametrize("make", [torch.from_numpy, torch.as_tensor, torch.tensor], ids=lambda f: f.__name__)
def test_an_array_made_into_a_tensor_is_no_stale_constant(make):
    numbers = np.full(5_000, 0.5)

    def model():
        z = pyro.sample("z1", dist.Bernoulli(OBSERVED.new_tensor(0.5)))
        pyro.sample("z2", dist.Bernoulli(OBSERVED.new_tensor(0.5)))
        pyro.sample("x", dist.Normal(make(numbers).mean() * z, OBSERVED.new_tensor(1.0)), obs=OBSERVED)

    pyro.clear_param_store()
    kept = TraceGrad_ELBO(estimators={"z*": LocalExpectation()}, compile=CHEAP)
    for _ in range(5):
        before = found(kept, model)
    assert graphs(kept) == 1
    numbers[4_000:] = -3.0
    right = found(TraceGrad_ELBO(estimators={"z*": LocalExpectation()}), model)
    assert not torch.allclose(before, right)
    for _ in range(3):
        torch.testing.assert_close(found(kept, model), right, rtol=1e-12, atol=1e-12)


def test_a_program_that_cannot_be_watched_is_not_compiled_and_says_so():
    generator = np.random.default_rng(0)
    model = model_of(lambda: generator.random() > 0.5)
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"z*": ScoreFunction()}, compile=CHEAP)
    with pytest.warns(
        UserWarning, match=r"eagerly, because it reads an object of type numpy\.random\._generator\.Generator"
    ):
        for _ in range(8):
            elbo.loss_and_grads(model, guide)
    assert graphs(elbo) == 0


RULES = {
    "attributes": ("_attributes_of", "attributes: Namespace"),
    "cells": ("_cell", "containers: array of 5000"),
    "arrays": ("_array", "containers: array of 5000"),
    "classes": ("_one_class", "classes: inherited"),
    "slots": ("_slots", "attributes: slot"),
    "names": ("_global", "ambient: global"),
    "imports": ("_imports", "ambient: import"),
    "mappings": ("_mapping", "modules: ModuleDict"),
    "references": ("_reference", "attributes: weak reference"),
    "buffers": ("_buffer", "containers: bytearray"),
    "builtins": ("_builtin", "containers: bound method of a dict"),
    "partials": ("_partial", "containers: partial"),
}


@pytest.mark.parametrize("rule", RULES)
def test_without_a_rule_a_change_is_missed(rule, monkeypatch):
    """Each rule of the guard is needed: without it a program that changed counts as the same."""
    method, name = RULES[rule]
    kind, _, case = name.partition(": ")
    for broken in (False, True):
        read, change = {each: rest for each, *rest in dict(EVERYTHING)[kind]()}[case]
        if broken:
            nothing = {} if rule == "imports" else None
            monkeypatch.setattr(Guard, method, lambda self, *x, nothing=nothing: nothing)
            visits = {k: getattr(Guard, method) if v.__name__ == method else v for k, v in _VISITS.items()}
            monkeypatch.setattr("pplgrad.pyro._reuse.guards._VISITS", visits)
        read()
        guard = Guard.of(model_of(read))
        undo = change()
        try:
            assert (guard is None or not guard.holds()) != broken
        finally:
            if isinstance(undo, FunctionType):
                undo()
