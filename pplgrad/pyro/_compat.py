"""What compiled steps and optimizers use of torch and Pyro that is private there, or differs between versions: all of it is here.

`tests/pyro/test_compile_refusals.py` tests each function by itself, so that a new version that breaks one is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from threading import Lock
from typing import Any

import pyro
import torch
from pyro.distributions.distribution import DistributionMeta
from pyro.ops.einsum.adjoint import require_backward
from pyro.optim import PyroOptim
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch.autograd import forward_ad
from torch.distributions import Distribution
from torch.fx import GraphModule

Graph = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def inductor(graph: GraphModule, inputs: Sequence[torch.Tensor], options: dict[str, Any]) -> Graph:
    """Return a graph compiled by the inductor, without Dynamo, which would trace it once more and check it at every call."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=options)


def load_inductor() -> None:
    """Import the inductor."""
    import torch._inductor.compile_fx  # noqa: F401


def inductor_pass(change: Callable[[torch.fx.Graph], None], file: str) -> Any:
    """Return a pass of the inductor's that changes its graph, known by its source's file; None where it takes none, or has one."""
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        return None

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            change(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((file,))

    return Pass()


def takes_a_pass() -> bool:
    """Return whether the inductor has no pass of the user's in the place of ours."""
    return torch._inductor.config.post_grad_custom_pre_pass is None


def registered_backend(name: str | Callable) -> Callable:
    """Return one of torch.compile's backends by its name."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors to whose gradients `loss.backward()` would add."""
    leaves = (function.variable for function in backward_functions(loss) if hasattr(function, "variable"))
    return list({id(leaf): leaf for leaf in leaves}.values())


def backward_functions(x: torch.Tensor, ends: Callable[[Any], bool] = lambda function: False) -> Iterator[Any]:
    """Yield the functions that a derivative goes back through, each once; not beyond those at which it `ends`."""
    seen: set[Any] = set()
    ahead = [x.grad_fn]
    while ahead:
        function = ahead.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        yield function
        if not ends(function):
            ahead += [after for after, _ in function.next_functions]


_HOOKS = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def have_hooks(leaves: Collection[torch.Tensor]) -> bool:
    """Return whether a function is to be called when a gradient of one of the tensors is computed or added up."""
    return any(any(map(hooks, leaves)) for hooks in _HOOKS)


def keep_inverse(fn: Any, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let a flow's transforms know the inverse of a copy of what they made, which many can only remember."""
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    ahead = list(getattr(fn, "transforms", ()))
    while ahead:
        transform = ahead.pop()
        ahead += getattr(transform, "parts", ())
        before, after = getattr(transform, "_cached_x_y", (None, None))
        if after is old:
            transform._cached_x_y = before, new


def is_outermost(handler: Any) -> bool:
    """Return whether no other handler of Pyro's stands around one."""
    return bool(_PYRO_STACK) and _PYRO_STACK[0] is handler


def markov_step() -> tuple[Any, int]:
    """Return the outermost `pyro.markov` loop that runs, and the number of its step; None and 0 outside of all.

    As a decorator or in a `with`, `pyro.markov` does not number steps.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, MarkovMessenger) and handler._iterable is not None:
            return handler, handler._pos
    return None, 0


def other_handlers() -> list[str]:
    """Return the names of Pyro's handlers around a step, except those that only look at its parameters."""
    return [
        type(handler).__name__
        for handler in _PYRO_STACK
        if not (isinstance(handler, BlockMessenger) or (isinstance(handler, TraceMessenger) and handler.param_only))
    ]


def enumerate_from(dim: int) -> None:
    """Let the next enumerated site have a dimension, and those after it the dimensions to its left."""
    _ENUM_ALLOCATOR.set_first_available_dim(dim)


def in_vectorized_markov(infer: Mapping[str, Any]) -> bool:
    """Return whether a site stands in a step of `vectorized_markov` that another of its steps stands for: its density is not to be counted."""
    return "_do_not_score" in infer


def written_name(name: str, names: Collection[str]) -> str | None:
    """Return the name of the site with `obs_mask` of which a site is the part that is not observed, or None; `names` are those of all sites."""
    whole = name.removesuffix("_unobserved")
    return whole if whole != name and {whole, f"{whole}_observed"} <= set(names) else None


def ask_for_indices(term: torch.Tensor) -> None:
    """Let what goes back through the messages of a ring note at which indices of a packed tensor it is."""
    require_backward(term)


def indices_back(
    total: torch.Tensor, terms: Sequence[torch.Tensor], dims: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Go back through the messages of a ring (its samples, or its maxima), and yield where each tensor is along a dimension.

    These are numbers, and the names of their dimensions.
    """
    total._pyro_backward()  # type: ignore[attr-defined]
    for term, dim in zip(terms, dims, strict=True):
        found: Any = term._pyro_backward_result  # type: ignore[attr-defined]
        if found is None or dim not in found._pyro_sample_dims:  # A dimension of one value.
            yield "", torch.zeros((), dtype=torch.long, device=term.device)
        else:
            yield found._pyro_dims[1:], found[found._pyro_sample_dims.index(dim)]


class _Kept(dict):
    """The tensors of the param store, of which `named_parameters` shows those alone that are parameters, not state of a baseline.

    The store reads, saves, loads and copies all of them by its other methods, which look at names one by one or copy the dict whole.
    """

    state: frozenset[str] = frozenset()

    def items(self) -> Any:
        if self.state.isdisjoint(self):
            return super().items()
        return {name: x for name, x in super().items() if name not in self.state}.items()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def hide_state(names: Iterable[str]) -> None:
    """Let `named_parameters` of the param store leave out some names, which get no gradient."""
    store = pyro.get_param_store()
    held = store._params
    if not isinstance(held, _Kept):
        if type(held) is not dict:
            return  # Another class of store: left as it is.
        held = store._params = _Kept(held)
    if not held.state.issuperset(names):
        held.state = held.state | frozenset(names)


def hidden_state() -> frozenset[str]:
    """Return the names that `hide_state` was given."""
    held = pyro.get_param_store()._params
    return held.state if isinstance(held, _Kept) else frozenset()


def unconstrained() -> dict[str, torch.Tensor]:
    """Return the leaves of the param store by name, state of baselines included."""
    return dict(pyro.get_param_store()._params)


def constraints() -> dict[str, Any]:
    """Return the constraints of the param store by name."""
    # The public `get_state` takes from the parameters what SVI finds their unconstrained values by.
    return dict(pyro.get_param_store()._constraints)


def loaded_state(optimizer: PyroOptim) -> dict:
    """Return the state that an optimizer was given for parameters that it has not met yet."""
    return dict(optimizer._state_waiting_to_be_consumed)


def settings() -> tuple:
    """Return torch's settings that decide what an operation computes."""
    return (
        torch.get_default_dtype(),
        *(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ),
    )


@contextmanager
def swaps_noted(note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Tell when two tensors of Python's change places (`torch.utils.swap_tensors`), which is no operation."""
    plain = torch._C._swap_tensor_impl

    def swap(first: torch.Tensor, second: torch.Tensor) -> None:
        plain(first, second)
        note(first)
        note(second)

    torch._C._swap_tensor_impl = swap
    try:
        yield
    finally:
        torch._C._swap_tensor_impl = plain


class _Wrapped:
    """Methods of a class, wrapped while a thread needs it."""

    def __init__(self, owner: type, *names: str) -> None:
        self._lock, self._users = Lock(), 0
        self._owner, self._names = owner, names
        self._plain: dict[str, Callable] = {}

    def wrap(self, wrapper: Callable[[Callable], Callable]) -> None:
        """Put a wrapper around the methods, unless another user has."""
        with self._lock:
            if not self._users:
                self._plain = {name: getattr(self._owner, name) for name in self._names}
                for name, method in self._plain.items():
                    setattr(self._owner, name, wrapper(method))
            self._users += 1

    def unwrap(self) -> None:
        """Put the methods back, if this was the last user."""
        with self._lock:
            self._users -= 1
            if not self._users:
                for name, method in self._plain.items():
                    setattr(self._owner, name, method)


VALIDATION = _Wrapped(Distribution, "__init__", "_validate_sample")
"""The methods by which torch's distributions check their arguments and values."""
CONSTRUCTION = _Wrapped(DistributionMeta, "__call__")
"""What makes Pyro's distributions."""


class NoMode:
    """Runs operations where no mode of Python's sees them; a class, since a generator costs as much again."""

    __slots__ = ("_function", "_dispatch")

    def __enter__(self) -> None:
        self._function, self._dispatch = torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch()
        self._function.__enter__()
        self._dispatch.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._dispatch.__exit__(*exc)
        self._function.__exit__(*exc)


WithoutDispatch = torch._C._DisableTorchDispatch
"""Runs operations where no dispatch mode of Python's sees them: inside of a function mode, which does not see them either."""
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether `torch.vmap` or `torch.func` hands this tensor to a function."""
WithoutFunctions = torch._C.DisableTorchFunction
"""Runs operations where no function mode of Python's sees them."""
is_hidden: Callable[[], bool] = partial(torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C.DispatchKey.Python)
"""Whether no dispatch mode sees what runs now."""
exempting = True
"""Whether anything is run where the modes do not see it: tests switch it off, to compare what is found."""
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_any_autocast = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def only_ours(functions: int = 0) -> bool:
    """Return whether nothing takes part in a call but one dispatch mode, and so many function modes: one that is running does not count.

    That would be another mode, a transformation of `torch.func`, autocast, forward derivatives, a trace, or hooks of saved tensors.
    """
    return (
        exempting
        and _dispatch_modes() == 1
        and _function_modes() == functions
        and not _any_autocast()
        and _functorch_level() is None
        and _tracing() is None
        and _saving_hooks(True) is None
        and forward_ad._current_level < 0
    )


def nothing_looks_on() -> bool:
    """Return whether no mode, transformation or trace sees the operations that run now."""
    return _dispatch_modes() == 0 and _function_modes() == 0 and _functorch_level() is None and _tracing() is None


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that operations see in the place of one that `torch.vmap` or `torch.func` hands to a function."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
