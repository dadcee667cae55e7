"""Programs whose Python state decides which draw a cost reads, and how that state is changed between two steps."""

import argparse
import array as arrays
import collections
import contextvars
import dataclasses
import enum
import functools
import itertools
import os
import queue
import random
import threading
import types
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

FLAGS = types.SimpleNamespace(second=False)
SWITCH = False
OBSERVED = torch.tensor(1.4, dtype=torch.float64)
START = torch.tensor([0.3, -0.4], dtype=torch.float64)


def guide():
    l = pyro.param("l", START)
    pyro.sample("z1", dist.Bernoulli(logits=l[0]))
    pyro.sample("z2", dist.Bernoulli(logits=l[1]))


def model_of(read):
    """Return a model whose cost reads the second draw if `read()` is true, else the first."""

    def model():
        z1, z2 = (pyro.sample(name, dist.Bernoulli(OBSERVED.new_tensor(0.5))) for name in ("z1", "z2"))
        pyro.sample("x", dist.Normal(2 * (z2 if read() else z1), OBSERVED.new_tensor(1.0)), obs=OBSERVED)

    return model


class Slotted:
    __slots__ = ("second",)

    def __init__(self):
        self.second = False


class Mode(enum.Enum):
    FIRST, SECOND = 1, 2


@dataclasses.dataclass
class Config:
    second: bool = False
    names: list = dataclasses.field(default_factory=list)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(1, 1)})
        self.named = nn.ParameterDict({"a": torch.ones(1)})
        self.listed = nn.ModuleList()
        self.dropout = nn.Dropout(0.5)


def attributes():
    """Yield (name, what the program reads, what changes it) for attributes of objects."""
    for kind in (argparse.Namespace, types.SimpleNamespace, Config):
        held = kind(second=False)
        yield kind.__name__, lambda held=held: held.second, lambda held=held: setattr(held, "second", True)
        grows = kind()
        yield f"new in {kind.__name__}", lambda x=grows: hasattr(x, "more"), lambda x=grows: setattr(x, "more", 1)
    slotted, plain, mode = Slotted(), types.SimpleNamespace(), types.SimpleNamespace(now=Mode.FIRST)
    yield "slot", lambda: slotted.second, lambda: setattr(slotted, "second", True)
    yield "enum", lambda: mode.now is Mode.SECOND, lambda: setattr(mode, "now", Mode.SECOND)
    target = Config()
    reference = weakref.ref(target)
    yield "weak reference", lambda: reference().second, lambda: setattr(target, "second", True)
    plain.second = 0.0
    yield "sign of zero", lambda: str(plain.second) == "-0.0", lambda: setattr(plain, "second", -0.0)
    tensor, asks = torch.zeros(()), torch.zeros(())
    yield "tensor's attribute", lambda: hasattr(tensor, "second"), lambda: setattr(tensor, "second", 1)
    first, second = torch.zeros(()), torch.zeros(())
    named, chosen = {first: False, second: True}, types.SimpleNamespace(x=first)
    yield "key of a dict", lambda: named[chosen.x], lambda: setattr(chosen, "x", second)
    matrix = types.SimpleNamespace(x=torch.arange(9.0).reshape(3, 3))
    yield "strides", lambda: not matrix.x.is_contiguous(), lambda: setattr(matrix, "x", matrix.x.T)
    yield "tensor asks for a gradient", lambda: asks.requires_grad, lambda: asks.requires_grad_()


def classes():
    """Yield the same for what classes and functions have."""
    inside = {"second": False}

    class Meta(type):
        second = False

    class Parent(metaclass=Meta):
        third = False

        @property
        def computed(self):
            return inside["second"]

        def __getattr__(self, name):
            return inside["second"]

    class Child(Parent):
        pass

    class Other(Child):
        pass

    held, other = Child(), Child()

    def function(second=False):
        return second or function.second

    function.second = False

    def coded():
        return False

    def outer(second):
        return lambda: (lambda: second[0])()

    deep = [False]
    closure = outer(deep)
    yield "class attribute", lambda: Child.third, lambda: setattr(Child, "third", True)
    yield "inherited", lambda: held.third, lambda: setattr(Parent, "third", True)
    yield "instance over class", lambda: held.third, lambda: setattr(held, "third", True)
    yield "metaclass", lambda: Child.second, lambda: setattr(Meta, "second", True)
    yield "__getattr__", lambda: held.anything, lambda: inside.update(second=True)
    yield "property", lambda: held.computed, lambda: inside.update(second=True)
    yield "property replaced", lambda: held.computed, lambda: setattr(Parent, "computed", True)
    yield "class of an object", lambda: isinstance(other, Other), lambda: setattr(other, "__class__", Other)
    yield "bases", lambda: issubclass(Other, Mixin), lambda: setattr(Other, "__bases__", (Child, Mixin))
    yield "function's attribute", lambda: function(), lambda: setattr(function, "second", True)
    yield "default", lambda: function(), lambda: setattr(function, "__defaults__", (True,))
    yield "code", lambda: coded(), lambda: setattr(coded, "__code__", (lambda: True).__code__)
    yield "closure over a closure", lambda: closure(), lambda: deep.__setitem__(0, True)
    yield "dispatched by name", lambda: getattr(held, "".join(["thi", "rd"])), lambda: setattr(held, "third", True)


class Mixin:
    pass


def containers():
    """Yield the same for containers of Python and NumPy."""
    inner = [[0], {"a": (0, [0])}]
    yield "nested", lambda: inner[1]["a"][1][0], lambda: inner[1]["a"][1].__setitem__(0, 1)
    for make in (dict, collections.OrderedDict, collections.UserDict, collections.Counter):
        held = make(a=0)
        yield make.__name__, lambda held=held: held["a"], lambda held=held: held.update(a=1)
        grows = make(a=0)
        yield f"{make.__name__} grows", lambda x=grows: "b" in x, lambda x=grows: x.update(b=0)
    ordered = {"a": 0, "b": 1}
    yield "order of a dict", lambda: list(ordered)[0] == "b", lambda: ordered.update(a=ordered.pop("a"))
    moved = collections.OrderedDict(a=0, b=1)
    yield "order of an OrderedDict", lambda: list(moved)[0] == "b", lambda: moved.move_to_end("a")
    default = collections.defaultdict(int)
    yield (
        "default factory",
        lambda: dict(default) or default.default_factory(),
        lambda: setattr(default, "default_factory", lambda: 1),
    )
    chained = collections.ChainMap({}, {"a": 0})
    yield "ChainMap", lambda: chained["a"], lambda: chained.maps[0].update(a=1)
    ring, numbers = collections.deque([0]), {1}
    yield "deque", lambda: ring[0], lambda: ring.__setitem__(0, 1)
    yield "set", lambda: 2 in numbers, lambda: numbers.add(2)
    proxied = {"a": 0}
    proxy = types.MappingProxyType(proxied)
    yield "mapping proxy", lambda: proxy["a"], lambda: proxied.update(a=1)
    bound = {"a": 0}.get
    yield "bound method of a dict", lambda: bound("a"), lambda: bound.__self__.update(a=1)
    part = functools.partial(dict.get, {"a": 0}, "a")
    yield "partial", lambda: part(), lambda: part.args[0].update(a=1)
    for size in (3, 5_000, 3_000_000):
        large = np.zeros(size)
        yield f"array of {size}", lambda x=large: x[-1] > 0, lambda x=large: x.__setitem__(-1, 1.0)
    table = np.array([0, None], dtype=object)
    yield "array of objects", lambda: table[0], lambda: table.__setitem__(0, 1)
    strided = np.zeros((40, 40))[::2, 1::2]
    yield "view of an array", lambda: strided[3, 3] > 0, lambda: strided.__setitem__((3, 3), 1.0)
    shared = np.zeros(3, dtype=np.float32)
    view = memoryview(shared)
    yield "memoryview", lambda: view[1] > 0, lambda: shared.__setitem__(1, 1.0)
    raw, compact = bytearray(3), arrays.array("d", [0.0])
    yield "bytearray", lambda: raw[0], lambda: raw.__setitem__(0, 1)
    yield "array.array", lambda: compact[0] > 0, lambda: compact.__setitem__(0, 1.0)
    masked = np.ma.masked_array([0.0, 1.0], [True, False])
    yield "masked array", lambda: masked.mask[1], lambda: masked.mask.__setitem__(1, True)


def modules():
    """Yield the same for modules of torch and what Pyro holds."""
    net = [Net() for _ in range(8)]
    yield "ModuleDict", lambda: "b" in net[0].parts, lambda: net[0].parts.update({"b": nn.Linear(1, 1)})
    yield "ParameterDict", lambda: "b" in net[1].named, lambda: net[1].named.update({"b": torch.ones(1)})
    yield "ModuleList", lambda: len(net[2].listed), lambda: net[2].listed.append(nn.Linear(1, 1))
    yield "training", lambda: not net[3].training, lambda: net[3].eval()
    yield "rate", lambda: net[4].dropout.p == 0, lambda: setattr(net[4].dropout, "p", 0)
    yield "hook", lambda: net[5]._forward_hooks, lambda: net[5].register_forward_hook(lambda *x: None)
    yield "buffer", lambda: "extra" in net[6]._buffers, lambda: net[6].register_buffer("extra", torch.ones(1))
    yield "parameter taken away", lambda: net[7].dropout.p is None, lambda: setattr(net[7].dropout, "p", None)
    store = pyro.get_param_store()
    one = torch.ones(1, dtype=torch.float64)
    yield (
        "shape of a parameter",
        lambda: len(pyro.param("shape", one)) > 1,
        lambda: store.__setitem__("shape", one.repeat(2)),
    )
    yield (
        "a parameter that is frozen",
        lambda: not pyro.param("frozen", one).requires_grad,
        lambda: dict(store.named_parameters())["frozen"].requires_grad_(False),
    )
    yield "param store", lambda: "more" in pyro.get_param_store(), lambda: pyro.param("more", torch.ones(1))
    yield "param store held", lambda: "again" in store.keys(), lambda: pyro.param("again", torch.ones(1))
    normal = dist.Normal(OBSERVED, 1.0)
    yield "distribution", lambda: hasattr(normal, "second"), lambda: setattr(normal, "second", 1)


def ambient():
    """Yield the same for what no object of the program holds; what the change returns undoes it."""
    variable, local = contextvars.ContextVar("second", default=False), threading.local()
    local.second = False

    def dtype():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if before != torch.float64 else torch.float32)
        return lambda: torch.set_default_dtype(before)

    first = torch.get_default_dtype()
    yield "default dtype", lambda: torch.get_default_dtype() != first, dtype
    yield "context variable", lambda: variable.get(), lambda: variable.set(True) and None
    yield "thread-local", lambda: local.second, lambda: setattr(local, "second", True)
    yield "os.environ", lambda: os.environ.get("PPLGRAD_SECOND"), environ
    yield "os.getenv", lambda: os.getenv("PPLGRAD_SECOND"), environ
    yield "global", lambda: SWITCH, switch
    yield "globals()", lambda: globals()["SWITCH"], switch
    yield "import", imported, switch
    yield "validation", lambda: pyro.settings.get("validate_infer") is False, validation


def environ():
    os.environ["PPLGRAD_SECOND"] = "1"
    return lambda: os.environ.pop("PPLGRAD_SECOND")


def switch():
    global SWITCH
    SWITCH = True

    def back():
        global SWITCH
        SWITCH = False

    return back


def imported():
    from tests.pyro import changing

    return changing.SWITCH


def validation():
    before = pyro.settings.get("validate_infer")
    pyro.settings.set(validate_infer=False)
    return lambda: pyro.settings.set(validate_infer=before)


def hidden():
    """Yield the same for what nobody can look into."""

    @functools.lru_cache
    def cached_config():
        return Config()

    @functools.singledispatch
    def dispatched(x):
        return False

    numbers, ticks = iter([0] * 6 + [1] * 9), itertools.count()
    yield "iterator", lambda: next(numbers), lambda: None
    yield "count", lambda: next(ticks) % 2, lambda: None
    jobs = queue.Queue()
    yield "queue", lambda: not jobs.empty(), lambda: jobs.put(1)
    event = threading.Event()
    yield "event", lambda: event.is_set(), lambda: event.set()
    yield "cache", lambda: cached_config().second, lambda: setattr(cached_config(), "second", True)
    yield "singledispatch", lambda: dispatched(1), lambda: dispatched.register(int, lambda x: True) and None
    generator, python, legacy = np.random.default_rng(0), random.Random(0), np.random.RandomState(0)
    yield "np.random.Generator", lambda: generator.integers(2), lambda: None
    yield "random.Random", lambda: python.random() > 0.5, lambda: None
    yield "RandomState", lambda: legacy.rand() > 0.5, lambda: None
    own = torch.Generator()
    yield "torch.Generator", lambda: own.initial_seed() == 1, lambda: own.manual_seed(1) and None


EVERYTHING = [
    ("attributes", attributes),
    ("classes", classes),
    ("containers", containers),
    ("modules", modules),
    ("ambient", ambient),
]
EVERYTHING += [("hidden", hidden)]
