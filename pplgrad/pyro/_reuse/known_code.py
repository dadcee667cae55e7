"""What a program may use and still have its dependencies reused: code whose results follow from its arguments.

The list is closed: what is not on it is looked into like the user's own code, and what cannot be looked into makes a program
unwatchable. Torch's random numbers are on it, since a structure does not depend on what is drawn and a compiled step draws
anew; so are what torch and Pyro are set to (default dtype, gradients on or off, validation), which `ambient` compares.
"""

from __future__ import annotations

import builtins
import inspect
import re
import types
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch


class Changing(NamedTuple):
    """Attributes of a library's class that change at each step, and steer nothing."""

    module: str
    name: str
    attributes: frozenset[str]


_MODULES = frozenset(
    {
        # Of Python.
        *(
            "builtins",
            "math",
            "cmath",
            "operator",
            "_operator",
            "functools",
            "_functools",
            "itertools",
            "types",
            "typing",
        ),
        *(
            "collections",
            "_collections",
            "_collections_abc",
            "abc",
            "_abc",
            "dataclasses",
            "enum",
            "numbers",
            "fractions",
        ),
        *(
            "copy",
            "contextlib",
            "string",
            "warnings",
            "_warnings",
            "bisect",
            "_bisect",
            "heapq",
            "_heapq",
            "array",
            "re",
        ),
        *("reprlib", "_typing", "typing_extensions", "__future__", "textwrap", "weakref", "_weakref", "_weakrefset"),
        # Of others.
        *("torch", "pyro", "pplgrad", "numpy", "array_api_compat", "opt_einsum", "scipy.special"),
    }
)
_NOT = frozenset(
    {
        # Programs of the user's kind.
        "pplgrad.testing",
        # Random numbers and files, and what a machine or a process is at the moment.
        *(
            "numpy.random",
            "numpy.lib.npyio",
            "numpy.lib._npyio_impl",
            "numpy.memmap",
            "numpy.testing",
            "numpy.ctypeslib",
        ),
        *(
            "torch.random",
            "torch.hub",
            "torch.serialization",
            "torch.utils.data",
            "torch.utils.benchmark",
            "torch.cuda",
        ),
        *(
            "torch.distributed",
            "torch.multiprocessing",
            "torch.profiler",
            "torch.futures",
            "torch.monitor",
            "torch.xpu",
        ),
        *(
            "torch.backends",
            "torch.accelerator",
            "torch.mps",
            "torch.cpu",
            "torch.compiler",
            "torch.package",
            "torch.classes",
        ),
        *(
            "torch.utils.cpp_extension",
            "torch.utils.model_zoo",
            "torch.utils.tensorboard",
            "torch.overrides",
            "torch._dynamo",
        ),
        *(
            "torch.utils._device",
            "torch.jit",
            "torch.fx",
            "torch.export",
            "torch.onnx",
            "torch.library",
            "torch.testing",
        ),
        *(
            "pyro.optim",
            "pyro.settings",
            "pyro.logger",
            "pyro.contrib.examples",
            "pyro.contrib.forecast",
            "pyro.ops.streaming",
        ),
    }
)
_FUNCTIONS = frozenset({"torch.random.manual_seed", "torch.random.fork_rng"})
_NO_FUNCTIONS = frozenset(
    {
        *("torch.initial_seed", "torch.seed", "torch.get_rng_state", "torch.load", "torch.save", "torch.from_file"),
        *(
            "torch.compile",
            "torch.get_file_path",
            "torch.empty",
            "torch.empty_like",
            "torch.is_storage",
            "torch.utils.dlpack",
        ),
        *("pyro.get_param_store", "pyro.util.get_rng_state", "pyro.params.param_store.get_param_store"),
        *("numpy.load", "numpy.fromfile", "numpy.loadtxt", "numpy.genfromtxt", "numpy.memmap", "numpy.geterr"),
        *("numpy.get_printoptions", "numpy.open_memmap", "numpy.fromregex", "numpy.getbufsize", "numpy.geterrcall"),
        *("typing.get_type_hints", "copy._reconstruct", "types.FunctionType", "types.CodeType"),
    }
) - {"torch.empty", "torch.empty_like", "torch.is_storage"}
_BUILTINS = frozenset(
    {
        *(
            "abs",
            "all",
            "any",
            "ascii",
            "bin",
            "bool",
            "bytearray",
            "bytes",
            "callable",
            "chr",
            "classmethod",
            "complex",
        ),
        *(
            "delattr",
            "dict",
            "dir",
            "divmod",
            "enumerate",
            "filter",
            "float",
            "format",
            "frozenset",
            "getattr",
            "hasattr",
        ),
        *("hex", "int", "isinstance", "issubclass", "iter", "len", "list", "locals", "map", "max", "memoryview", "min"),
        *("next", "object", "oct", "ord", "pow", "print", "property", "range", "repr", "reversed", "round", "set"),
        *("setattr", "slice", "sorted", "staticmethod", "str", "sum", "super", "tuple", "type", "vars", "zip"),
        *("Ellipsis", "NotImplemented", "None", "True", "False", "__build_class__", "__debug__", "__name__", "__doc__"),
        *(
            name
            for name, found in vars(builtins).items()
            if isinstance(found, type) and issubclass(found, BaseException)
        ),
    }
)
LOOKING_UP = frozenset(
    {
        "getattr",
        "hasattr",
        "setattr",
        "delattr",
        "vars",
        "dir",
        "attrgetter",
        "methodcaller",
        "__dict__",
        "format",
        "format_map",
    }
)
"""Names by which code may take attributes that are not written in it."""
HIDDEN = frozenset(
    {
        *("__globals__", "__builtins__", "__subclasses__", "__code__", "__closure__", "cell_contents", "__loader__"),
        *("__spec__", "__self__", "__annotations__", "f_back", "f_globals", "f_locals", "f_builtins", "tb_frame"),
        *(
            "gi_frame",
            "cr_frame",
            "__getattribute__",
            "__reduce__",
            "__reduce_ex__",
            "__weakref__",
            "__path__",
            "__file__",
        ),
        # What a tensor says of its past and its place.
        *("_version", "data_ptr", "grad", "is_shared", "__cuda_array_interface__", "share_memory_", "retains_grad"),
        *("storage_offset", "_base", "grad_fn", "output_nr"),
    }
)
"""Attributes that show what cannot be watched."""


CHANGING = (
    # The plates of a call, made anew from the prototype at each.
    Changing("pyro.infer.autoguide.guides", "AutoGuide", frozenset({"plates"})),
    # What a call has read so far; empty between calls. `used` says that there was a call.
    Changing("pyro.nn.module", "_Context", frozenset({"cache", "used"})),
    # The trace of the last run: written by the handler, and read by who holds it after the run.
    Changing("pyro.poutine.trace_messenger", "TraceMessenger", frozenset({"trace"})),
    # A plate that is a loop counts its turns from 0 in every run.
    Changing("pyro.poutine.indep_messenger", "IndepMessenger", frozenset({"counter"})),
    # The last pair of a bijection, used again for the same tensor only.
    Changing(
        "torch.distributions.transforms",
        "Transform",
        frozenset({"_cached_x_y", "_inv", "_cached_log_detJ", "_cached_scale", "_cached_log_scale", "_cached_logDetJ"}),
    ),
    # How often a gradient was recorded, and the records: they go to the user and not to the program.
    Changing("pplgrad.pyro._rerun.monitoring", "Watcher", frozenset({"*"})),
    Changing("pplgrad.monitoring.watch", "Watcher", frozenset({"*"})),
)
NOT_OF_CLASSES = frozenset(
    {
        "__doc__",
        "__annotations__",
        "_abc_impl",
        "__annotate_func__",
        "__annotations_cache__",
        "__static_attributes__",
        "__signature__",
        "__slotnames__",
    }
)
"""Of a class: what is text, and the cache of `isinstance` (`abc.get_cache_token` is compared instead)."""

ATOMS = frozenset(
    {
        types.CodeType,
        types.GenericAlias,
        types.UnionType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.ClassMethodDescriptorType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        re.Pattern,
        inspect.Signature,
        itemgetter,
        np.ufunc,
        type(np.sum),
        type(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)),
        torch._ops.OpOverload,
        torch._ops.OpOverloadPacket,
        type(Changing.__dict__["name"]),
    }
)
"""Types of objects that are known by identity, and have no state that changes."""


HEAP = 1 << 9
# Their classes are the language in which programs are written, and large.
SETTLED = ("enum", "abc", "typing", "torch", "torch._C", "torch._tensor", "torch.nn.parameter")
CODE = frozenset(
    {
        types.FunctionType,
        staticmethod,
        classmethod,
        property,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.BuiltinFunctionType,
        types.ClassMethodDescriptorType,
    }
)


@cache
def allowed(module: str | None) -> bool:
    """Return whether what a module's functions do follows from their arguments."""
    if not module:
        return False
    parts = module.split(".")
    above = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return not above.isdisjoint(_MODULES) and above.isdisjoint(_NOT)


@cache
def denied(module: str) -> bool:
    """Return whether a module is one of an allowed library that is not allowed itself."""
    parts = module.split(".")
    return any(".".join(parts[:i]) in _NOT for i in range(1, len(parts) + 1))


def denied_function(full: str) -> bool:
    """Return whether a function of an allowed module, by its full name, shows what cannot be watched."""
    return full in _NO_FUNCTIONS


def excepted_function(full: str) -> bool:
    """Return whether a function of a module that is not allowed is."""
    return full in _FUNCTIONS


def allowed_function(module: str | None, name: str) -> bool:
    """Return whether a library's function has its results from its arguments, torch's generator and what `ambient` compares."""
    full = f"{module}.{name}"
    if full in _NO_FUNCTIONS or (module or "").partition(".")[0] + "." + name in _NO_FUNCTIONS:
        return False
    if module == "builtins":
        return name in _BUILTINS
    return full in _FUNCTIONS or allowed(module)


def allowed_builtin(name: str) -> bool:
    """Return whether a name that Python itself has may be used."""
    return name in _BUILTINS


@cache
def changing(cls: Any) -> frozenset[str]:
    """Return the attributes of a library's class that change at each step and steer nothing."""
    known = {(base.__module__, base.__name__) for base in cls.__mro__}
    return frozenset().union(*(x.attributes for x in CHANGING if (x.module, x.name) in known))


@cache
def hides_state(cls: Any) -> type | None:
    """Return the class among a class's bases whose objects hold more than attributes and slots show, or None."""
    for one in cls.__mro__[:-1]:
        base: Any = one.__base__
        members = {name for name, x in vars(one).items() if type(x) is types.MemberDescriptorType}
        # An extension's members may be addresses of what is not shown.
        shown = len(members - {"__dict__", "__weakref__"}) if "__slots__" in vars(one) else 0
        shown += one.__dictoffset__ > 0 and not base.__dictoffset__
        shown += one.__weakrefoffset__ > 0 and not base.__weakrefoffset__
        more = one.__basicsize__ - base.__basicsize__ - 8 * shown
        # Behind an int, str or tuple of any length, the place of the attributes is counted or not.
        dict_behind = one.__itemsize__ and one.__dictoffset__ < 0 and not base.__dictoffset__
        if (more and not (dict_behind and more == 8)) or one.__itemsize__ != base.__itemsize__:
            return one
    return None
