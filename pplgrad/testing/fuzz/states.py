"""Kinds of Python state that a program may read and that somebody changes between steps, as source.

`setup` stands above the program, `read` is the expression in it, `write` the body of `set_state(v)`. With `argument` the state is handed to
model and guide as `state`; with `each_step` reading moves it on, so that it is set again before every step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """A kind of Python state: what makes it, reads it and changes it."""

    setup: str
    read: str
    write: str
    argument: bool = False
    each_step: bool = False


_CLASS = "class Config:\n    flag = 0\n\n\n"
_SEEDS = "SEEDS = [next(s for s in range(99) if np.random.default_rng(s).integers(2) == v) for v in (0, 1)]\n"
_OLD_SEEDS = "SEEDS = [next(s for s in range(99) if np.random.RandomState(s).randint(2) == v) for v in (0, 1)]\n"
_BITS = "SEEDS = [next(s for s in range(99) if random.Random(s).getrandbits(1) == v) for v in (0, 1)]\n"

STATES: dict[str, State] = {
    "namespace": State("import argparse\n\nCONFIG = argparse.Namespace(flag=0)\n", "CONFIG.flag", "CONFIG.flag = v"),
    "simple_namespace": State(
        "import types\n\nCONFIG = types.SimpleNamespace(flag=0)\n", "CONFIG.flag", "CONFIG.flag = v"
    ),
    "namespace_argument": State(
        "import argparse\n\nSTATE = argparse.Namespace(flag=0)\n", "state.flag", "STATE.flag = v", argument=True
    ),
    "dictionary": State("CONFIG = {'flag': 0}\n", "CONFIG['flag']", "CONFIG['flag'] = v"),
    "ordered_dictionary": State(
        "import collections\n\nCONFIG = collections.OrderedDict(flag=0)\n", "CONFIG['flag']", "CONFIG['flag'] = v"
    ),
    "default_dictionary": State(
        "import collections\n\nCONFIG = collections.defaultdict(int)\n", "CONFIG['flag']", "CONFIG['flag'] = v"
    ),
    "user_dictionary": State(
        "import collections\n\nCONFIG = collections.UserDict(flag=0)\n", "CONFIG['flag']", "CONFIG['flag'] = v"
    ),
    "list": State("FLAGS = [0, 0]\n", "FLAGS[1]", "FLAGS[1] = v"),
    "deque": State("import collections\n\nFLAGS = collections.deque([0])\n", "FLAGS[0]", "FLAGS[0] = v"),
    "set": State("FLAGS = set()\n", "('on' in FLAGS)", "FLAGS.add('on') if v else FLAGS.discard('on')"),
    "global": State("FLAG = 0\n", "FLAG", "global FLAG\n    FLAG = v"),
    "global_by_name": State("FLAG = 0\n", "globals()['FLAG']", "global FLAG\n    FLAG = v"),
    "class_attribute": State(_CLASS, "Config.flag", "Config.flag = v"),
    "attribute": State(_CLASS + "CONFIG = Config()\n", "CONFIG.flag", "CONFIG.flag = v"),
    "attribute_by_name": State(
        _CLASS + "CONFIG, NAME = Config(), 'flag'\n", "getattr(CONFIG, NAME)", "setattr(CONFIG, NAME, v)"
    ),
    "slots": State(
        "class Config:\n    __slots__ = ('flag',)\n\n\nCONFIG = Config()\nCONFIG.flag = 0\n",
        "CONFIG.flag",
        "CONFIG.flag = v",
    ),
    "property": State(
        "class Config:\n    hidden = [0]\n    flag = property(lambda self: self.hidden[0])\n\n\nCONFIG = Config()\n",
        "CONFIG.flag",
        "Config.hidden[0] = v",
    ),
    "metaclass": State(
        "class Meta(type):\n    flag = 0\n\n\nclass Config(metaclass=Meta):\n    pass\n\n\n",
        "Config.flag",
        "Meta.flag = v",
    ),
    "function_attribute": State("def setting():\n    pass\n\n\nsetting.flag = 0\n", "setting.flag", "setting.flag = v"),
    "module_attribute": State("import types\n\nm = types.ModuleType('m')\nm.flag = 0\n", "m.flag", "m.flag = v"),
    "closure": State(
        "def made():\n    flag = 0\n\n    def write(v):\n        nonlocal flag\n        flag = v\n\n"
        "    return (lambda: flag), write\n\n\nREAD, WRITE = made()\n",
        "READ()",
        "WRITE(v)",
    ),
    "bound_method": State("FLAGS = {'flag': 0}\nREAD = FLAGS.get\n", "READ('flag')", "FLAGS['flag'] = v"),
    "partial": State(
        "import functools\nimport operator\n\nFLAGS = [0]\nREAD = functools.partial(operator.getitem, FLAGS)\n",
        "READ(0)",
        "FLAGS[0] = v",
    ),
    "cache": State(
        "import functools\n\nHIDDEN = [0]\n\n\n@functools.lru_cache\ndef setting():\n    return HIDDEN[0]\n\n\n",
        "setting()",
        "HIDDEN[0] = v\n    setting.cache_clear()",
    ),
    "environment": State(
        "import os\n\nos.environ['PPLGRAD_FUZZ'] = '0'\n",
        "int(os.environ['PPLGRAD_FUZZ'])",
        "os.environ['PPLGRAD_FUZZ'] = str(v)",
    ),
    "context_variable": State(
        "import contextvars\n\nFLAG = contextvars.ContextVar('flag', default=0)\n", "FLAG.get()", "FLAG.set(v)"
    ),
    "thread_local": State(
        "import threading\n\nLOCAL = threading.local()\nLOCAL.flag = 0\n", "LOCAL.flag", "LOCAL.flag = v"
    ),
    "weak_reference": State(
        "import weakref\n\n\n" + _CLASS + "CONFIG = Config()\nREF = weakref.ref(CONFIG)\n",
        "REF().flag",
        "CONFIG.flag = v",
    ),
    "array": State("import array as arrays\n\nFLAGS = arrays.array('i', [0] * 9)\n", "FLAGS[7]", "FLAGS[7] = v"),
    "bytes": State("FLAGS = bytearray(9)\n", "FLAGS[7]", "FLAGS[7] = v"),
    "memory_view": State("FLAGS = memoryview(bytearray(9))\n", "FLAGS[7]", "FLAGS[7] = v"),
    "small_array": State("FLAGS = np.zeros(9)\n", "FLAGS[7]", "FLAGS[7] = v"),
    "large_array": State("FLAGS = np.zeros(1000)\n", "FLAGS[700]", "FLAGS[700] = v"),
    "large_argument": State("STATE = np.zeros(1000)\n", "state[700]", "STATE[700] = v", argument=True),
    "object_array": State("FLAGS = np.array([{'flag': 0}, None])\n", "FLAGS[0]['flag']", "FLAGS[0]['flag'] = v"),
    "file": State(
        "import pathlib\nimport tempfile\n\nFILE = pathlib.Path(tempfile.mkdtemp()) / 'flag'\nFILE.write_text('0')\n",
        "int(FILE.read_text())",
        "FILE.write_text(str(v))",
    ),
    "generator": State(
        "RNG = np.random.default_rng(0)\n" + _SEEDS,
        "RNG.integers(2)",
        "RNG.bit_generator.state = np.random.default_rng(SEEDS[v]).bit_generator.state",
        each_step=True,
    ),
    "generator_in_object": State(
        _CLASS + "CONFIG = Config()\nCONFIG.rng = np.random.default_rng(0)\n" + _SEEDS,
        "CONFIG.rng.integers(2)",
        "CONFIG.rng.bit_generator.state = np.random.default_rng(SEEDS[v]).bit_generator.state",
        each_step=True,
    ),
    "global_generator": State(_OLD_SEEDS, "np.random.randint(2)", "np.random.seed(SEEDS[v])", each_step=True),
    "python_generator": State(
        "import random\n\nRNG = random.Random(0)\n" + _BITS, "RNG.getrandbits(1)", "RNG.seed(SEEDS[v])", each_step=True
    ),
}
"""Every kind that runs without a library but NumPy."""

TORCH_STATES: dict[str, State] = {
    "module_attribute_of_torch": State("NET = torch.nn.Linear(1, 1)\nNET.flag = 0\n", "NET.flag", "NET.flag = v"),
    "growing_modules": State(
        "NET = torch.nn.ModuleList()\n", "len(NET)", "del NET[:]\n    NET.extend([torch.nn.Identity()] * v)"
    ),
    "growing_sequence": State(
        "NET = torch.nn.Sequential()\n",
        "sum(1 for _ in NET.children())",
        "[NET.append(torch.nn.Identity()) for _ in range(v)] if v else NET.__delitem__(slice(None))",
    ),
    "module_names": State(
        "NET = torch.nn.ModuleDict()\n",
        "('on' in NET)",
        "NET.clear()\n    NET.update({'on': torch.nn.Identity()} if v else {})",
    ),
    "training_mode": State("NET = torch.nn.Dropout(0.5).eval()\n", "NET.training", "NET.train(bool(v))"),
    "torch_generator": State(
        "RNG = torch.Generator()\n"
        "SEEDS = [next(s for s in range(99) if torch.randint(2, (), generator=RNG.manual_seed(s)) == v) for v in (0, 1)]\n",
        "torch.randint(2, (), generator=RNG).item()",
        "RNG.manual_seed(SEEDS[v])",
        each_step=True,
    ),
}
"""Kinds that torch brings."""
