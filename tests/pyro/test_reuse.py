"""The licence to reuse a structure is a closed one: state of every kind that changes between two steps, eager and compiled."""

import argparse
import array as arrays
import collections
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import os
import pickle
import random
import threading
import types
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam

from pplgrad import LocalExpectation, NeuralBaseline, ScoreFunction
from pplgrad.errors import BaselineError, ConfigurationError, ProgramError
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.pyro._reuse import dependency_structure
from pplgrad.pyro._reuse.guards import Guard
from tests.pyro.compiling import CHEAP


class Meta(type):
    flag = 0


class Base(metaclass=Meta):
    inherited = 0


class Child(Base):
    @property
    def prop(self):
        return self._prop

    def __getattr__(self, name):
        return {"dynamic": vars(type(self)).get("hidden", 0)}[name]


class Slots:
    __slots__ = ("on",)


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    on: int = 0


class Described:
    def __get__(self, owner, cls):
        return self.on


class WithDescriptor:
    field = Described()


MODULE = types.ModuleType("a_module_of_the_user")
FLAG = 0


def states():
    """Yield (name, what the program reads as a truth value, what changes it from false to true)."""

    def put(owner, name):
        setattr(owner, name, 0)
        return lambda: setattr(owner, name, 1)

    for kind in (argparse.Namespace, types.SimpleNamespace, Config, Slots):
        held = kind()
        yield kind.__name__, lambda held=held: held.on, put(held, "on")
    for kind in (collections.deque, list, bytearray):
        held = kind([0])
        yield kind.__name__, lambda held=held: held[0], lambda held=held: held.__setitem__(0, 1)
    numbers = arrays.array("i", [0])
    yield "array.array", lambda: numbers[0], lambda: numbers.__setitem__(0, 1)
    for kind in (dict, collections.OrderedDict, collections.Counter, collections.UserDict):
        held = kind(a=0)
        yield kind.__name__, lambda held=held: held["a"], lambda held=held: held.__setitem__("a", 1)
    default = collections.defaultdict(int)
    yield "defaultdict", lambda: default.get("a"), lambda: default.__setitem__("a", 1)
    chain = collections.ChainMap({}, {"a": 0})
    yield "ChainMap", lambda: chain["a"], lambda: chain.maps[0].update(a=1)

    def function():
        return function.flag

    yield "attribute of a function", function, put(function, "flag")
    store = {}

    @functools.lru_cache
    def cached():
        return store.get("a", 0)

    yield "lru_cache", cached, lambda: [store.update(a=1), cached.cache_clear()]
    part = functools.partial(lambda x: x.on, types.SimpleNamespace(on=0))
    yield "partial", part, lambda: setattr(part.args[0], "on", 1)
    yield "metaclass", lambda: Meta.flag, put(Meta, "flag")
    yield "inherited", lambda: Child().inherited, put(Base, "inherited")
    child = Child()
    yield "property", lambda: child.prop, put(child, "_prop")
    yield "__getattr__", lambda: child.dynamic, put(Child, "hidden")
    yield "enum", lambda: Color.RED.flag, put(Color.RED, "flag")
    yield "descriptor", lambda: WithDescriptor().field, put(vars(WithDescriptor)["field"], "on")
    yield "module", lambda: MODULE.flag, put(MODULE, "flag")
    yield "getattr of a module", lambda: getattr(MODULE, "fl" + "ag2"), put(MODULE, "flag2")
    yield "globals", lambda: globals()["FLAG"], lambda: globals().update(FLAG=1)
    yield "eval", lambda: eval("MODULE.flag3"), put(MODULE, "flag3")
    yield "environ", lambda: os.environ.get("PPLGRAD_TEST_FLAG"), lambda: os.environ.update(PPLGRAD_TEST_FLAG="1")
    variable = contextvars.ContextVar("variable", default=0)
    yield "context variable", variable.get, lambda: variable.set(1)
    local = threading.local()
    yield "thread-local", lambda: local.on, put(local, "on")
    target = Config()
    reference = weakref.ref(target)
    yield "weak reference", lambda: reference() and target.on, lambda: setattr(target, "on", 1)
    view = memoryview(bytearray([0]))
    yield "memoryview", lambda: view[0], lambda: view.__setitem__(0, 1)
    for size in (4, 4000):
        large = np.zeros(size)
        yield f"array of {size}", lambda a=large: a[3], lambda a=large: a.__setitem__(3, 1)
    boxed = np.array([0, None], dtype=object)
    yield "object array", lambda: boxed[0], lambda: boxed.__setitem__(0, 1)
    numbered = itertools.count()
    moved = [0]
    yield "count", lambda: [next(numbered), moved[0]][1], lambda: moved.__setitem__(0, 1)
    table = torch.nn.ModuleDict()
    yield "ModuleDict", lambda: "a" in table, lambda: table.update({"a": torch.nn.Identity()})
    grown = torch.nn.ModuleList()
    yield "ModuleList", lambda: len(grown), lambda: grown.append(torch.nn.Identity())
    dropout = torch.nn.Dropout(0.0)
    yield "rate", lambda: dropout.p, lambda: setattr(dropout, "p", 0.5)
    plain = torch.nn.Linear(1, 1).eval()
    yield "training", lambda: plain.training, plain.train
    yield "attribute of a library's class", lambda: torch.nn.Bilinear.flag, put(torch.nn.Bilinear, "flag")
    yield "param store", lambda: "extra" in pyro.get_param_store(), lambda: pyro.param("extra", torch.zeros(()))
    yield "dtype", lambda: torch.get_default_dtype() == torch.float32, lambda: torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    yield "threads", lambda: torch.get_num_threads() != threads, lambda: torch.set_num_threads(threads + 1)
    tensor = torch.zeros(())
    yield "attribute of a tensor", lambda: tensor.flag, put(tensor, "flag")
    kind = torch.zeros(())
    yield "requires_grad", lambda: kind.requires_grad, lambda: kind.requires_grad_()
    method = types.SimpleNamespace()
    method.call = lambda: 0
    yield "code", method.call, lambda f=method.call: setattr(f, "__code__", (lambda: 1).__code__)
    deep = (lambda box: lambda: (lambda: box[0])())(box := [0])
    yield "closure in a closure", deep, lambda: box.__setitem__(0, 1)

    def imports():
        import a_module_of_the_user as mine

        return mine.flag4

    import sys

    sys.modules["a_module_of_the_user"] = MODULE
    yield "import inside", imports, put(MODULE, "flag4")


def pair(read):
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        w = pyro.sample("w", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(2.0 * (w if read() else z), 1.0), obs=torch.tensor(1.4))

    def guide():
        a = pyro.param("a", torch.tensor([0.3, -0.4]))
        pyro.sample("z", dist.Bernoulli(logits=a[0]))
        pyro.sample("w", dist.Bernoulli(logits=a[1]))

    return model, guide


def gradient_of(elbo, model, guide):
    leaf = pyro.get_param_store()._params.get("a")
    if leaf is not None:
        leaf.grad = None
    elbo.loss_and_grads(model, guide)
    return pyro.get_param_store()._params["a"].grad.clone()


@pytest.fixture(autouse=True)
def restored():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    os.environ.pop("PPLGRAD_TEST_FLAG", None)


@pytest.mark.grid
@pytest.mark.parametrize("given", [False, CHEAP], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [name for name, *_ in states()])
def test_a_change_of_any_state_is_seen(name, given):
    """The gradient after a change is that of a new ELBO, which is exact here."""
    read, change = {each: found for each, *found in states()}[name]
    os.environ.pop("PPLGRAD_TEST_FLAG", None)
    globals()["FLAG"] = 0
    model, guide = pair(read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = TraceGrad_ELBO(estimators={"*": LocalExpectation()}, compile=given)
        for _ in range(5):
            before = gradient_of(kept, model, guide)
        change()
        found = gradient_of(kept, model, guide)
        wanted = gradient_of(TraceGrad_ELBO(estimators={"*": LocalExpectation()}), model, guide)
    torch.testing.assert_close(found, wanted, check_dtype=False)
    assert not torch.allclose(before.float(), wanted.float())


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        np.random.rand,
        np.random.default_rng(0).random,
        np.random.RandomState(0).rand,
        random.Random(0).random,
        lambda it=iter(itertools.cycle([0.2, 0.7])): next(it),
    ],
    ids=["random", "numpy", "Generator", "RandomState", "Random", "default argument"],
)
def test_random_numbers_of_others_are_no_constants(draw):
    model, guide = pair(lambda: draw() > 0.5)
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile=CHEAP)
    with pytest.warns(UserWarning, match="steps eagerly"):
        for _ in range(4):
            gradient_of(elbo, model, guide)
    assert all(known.compiled is None and known.following for known in elbo._structures._known.values())


def programs_that_are_reused():
    offset, config = torch.tensor(0.5), Config()
    network = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroParam(torch.tensor(0.2))
            self.inner = PyroModule[torch.nn.Linear](1, 1)

        def forward(self):
            return self.loc + self.inner(torch.ones(1)).sum() + getattr(self, "missing", 0.0)

    net = Net()
    yield "closure", lambda: offset * 2
    yield "network", lambda: network(torch.ones(1))[0]
    yield "PyroModule", net
    yield "dataclass", lambda: torch.tensor(float(config.on))
    yield "numpy", lambda: torch.as_tensor(np.log(2.0))
    yield "first of parameters", lambda: next(network.parameters()).sum()
    yield "functional", lambda: torch.nn.functional.softplus(offset)


@pytest.mark.grid
@pytest.mark.parametrize("name", [name for name, _ in programs_that_are_reused()])
@pytest.mark.parametrize("auto", [False, True], ids=["guide", "AutoNormal"])
def test_programs_that_are_reused(name, auto):
    read = dict(programs_that_are_reused())[name]

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))
        pyro.sample("x", dist.Normal(z + read(), 1.0), obs=torch.tensor(1.4))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))

    elbo = TraceGrad_ELBO()
    guide = AutoNormal(model) if auto else guide
    for _ in range(5):
        elbo.loss_and_grads(model, guide)
    (known,) = elbo._structures._known.values()
    assert known.reusable and known.reuses == 3


def test_what_no_guard_sees_is_found_by_watching_again(monkeypatch):
    """With a guard that holds always, the step that is watched again raises with nothing changed, or warns."""
    monkeypatch.setattr(Guard, "holds", lambda self: True)
    box = [0]
    model, guide = pair(lambda: box[0])
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    for _ in range(3):
        gradient_of(elbo, model, guide)
    box[0] = 1
    with pytest.raises(ProgramError, match="'x'"):
        gradient_of(elbo, model, guide)
    assert pyro.get_param_store()._params["a"].grad is None
    box[0] = 0
    elbo = TraceGrad_ELBO(estimators={"*": LocalExpectation()}, reuse_structure="warn")
    for _ in range(3):
        gradient_of(elbo, model, guide)
    box[0] = 1
    with pytest.warns(UserWarning, match="every step is watched"):
        found = gradient_of(elbo, model, guide)
    wanted = gradient_of(TraceGrad_ELBO(estimators={"*": LocalExpectation()}), model, guide)
    torch.testing.assert_close(found, wanted)
    box[0] = 0
    gradient_of(elbo, model, guide)
    (known,) = elbo._structures._known.values()
    assert known.following


def test_a_compiled_step_is_watched_again(monkeypatch):
    monkeypatch.setattr(Guard, "holds", lambda self: True)
    box = [0]
    model, guide = pair(lambda: box[0])
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile=CHEAP)
    for _ in range(4):
        gradient_of(elbo, model, guide)
    box[0] = 1
    with pytest.raises(ProgramError, match="'x'"):
        for _ in range(3):
            gradient_of(elbo, model, guide)


def test_watching_again_draws_no_more():
    model, guide = pair(lambda: 0)
    seen = []
    for reuse in (True, False):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, reuse_structure=reuse)
        seen.append([gradient_of(elbo, model, guide).tolist() for _ in range(20)])
    assert seen[0] == seen[1]


def test_the_switch():
    model, guide = pair(lambda: 0)
    elbo = TraceGrad_ELBO(reuse_structure=False)
    for _ in range(3):
        gradient_of(elbo, model, guide)
    assert all(known.following for known in elbo._structures._known.values())
    for wrong in ({"reuse_structure": "no"}, {"reuse_structure": 1.5}):
        with pytest.raises(ConfigurationError, match="reuse_structure"):
            TraceGrad_ELBO(**wrong)


@pytest.mark.parametrize("options", [{}, {"compile": CHEAP}, {"estimators": {"*": LocalExpectation()}}], ids=str)
def test_an_elbo_is_pickled_and_copied_after_steps(options):
    model, guide = pair(lambda: 0)
    elbo = TraceGrad_ELBO(**options)
    for _ in range(4):
        gradient_of(elbo, model, guide)
    for other in (pickle.loads(pickle.dumps(elbo)), copy.deepcopy(elbo)):
        assert not other._structures._known and elbo._structures._known
        gradient_of(other, model, guide)


@pytest.mark.parametrize("where", ["elbo", "guide"])
def test_a_baseline_that_comes_to_see_its_own_site_is_refused(where):
    """What an estimator's functions read is watched like the program, wherever the estimator was given."""
    looks, seen = [False], {}

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.4))

    def guide():
        seen["z"] = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    chosen = {"z": ScoreFunction(NeuralBaseline(inputs=lambda: seen["z"][None] if looks[0] else torch.zeros(1)))}
    if where == "guide":
        elbo, guide = TraceGrad_ELBO(), config_estimators(guide, chosen)
    else:
        elbo = TraceGrad_ELBO(estimators=chosen)
    for _ in range(4):
        elbo.loss_and_grads(model, guide)
    looks[0] = True
    with pytest.raises(BaselineError, match="'z'"):
        elbo.loss_and_grads(model, guide)


@pytest.mark.grid
@pytest.mark.parametrize("given", [False, CHEAP], ids=["eager", "compiled"])
@pytest.mark.parametrize("compare", ["two arguments", "one that is held", "a key", "strides", "is_leaf"])
def test_which_tensors_the_arguments_are_is_seen(compare, given):
    held, x, y = torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)
    named = {held: True, x: False}
    reads = {
        "two arguments": lambda a, b: a is b,
        "one that is held": lambda a, b: a is held,
        "a key": lambda a, b: named[a],
        "strides": lambda a, b: a.stride() == (1, 2),
        "is_leaf": lambda a, b: not a.is_leaf,
    }
    later = {"two arguments": (x, x), "strides": (x.T, y), "is_leaf": (torch.ones(2, 2).requires_grad_() * 1, y)}

    def model(a, b):
        z1, z2 = (pyro.sample(name, dist.Bernoulli(0.4)) for name in ("z1", "z2"))
        pyro.sample("x", dist.Normal(2 * (z2 if reads[compare](a, b) else z1), 1.0), obs=torch.tensor(1.4))

    def guide(a, b):
        logits = pyro.param("a", torch.tensor([0.3, -0.4]))
        for i in (0, 1):
            pyro.sample(f"z{i + 1}", dist.Bernoulli(logits=logits[i]))

    def gradient(elbo, *args):
        pyro.clear_param_store()
        elbo.loss_and_grads(model, guide, *args)
        return pyro.get_param_store()._params["a"].grad.clone()

    kept = TraceGrad_ELBO(estimators={"*": LocalExpectation()}, compile=given)
    start = (x.detach().clone().requires_grad_(), y) if compare == "is_leaf" else (x, y)
    for args in (*[start] * 5, later.get(compare, (held, y)), start):
        wanted = gradient(TraceGrad_ELBO(estimators={"*": LocalExpectation()}), *args)
        torch.testing.assert_close(gradient(kept, *args), wanted)


def test_compiled_steps_are_looked_at_as_far_as_the_process_has_time_and_not_while_it_waits(monkeypatch):
    spent = 10.0
    clock = types.SimpleNamespace(process_time=lambda: spent, perf_counter=lambda: 1e9)
    monkeypatch.setattr(dependency_structure, "time", clock)
    known = dependency_structure.Structure(compiled=types.SimpleNamespace(writes=False), reuses=63, since=0.0)
    known.looking = 1.0
    known.reuse()
    assert not known.watching_again
    spent, known.reuses = 60.0, 127
    known.reuse()
    assert known.watching_again
    # A forked process begins at zero.
    known.since, known.looking, known.reuses, spent = 50.0, 40.0, 255, 1.0
    known.reuse()
    assert known.watching_again and known.since == 1.0
