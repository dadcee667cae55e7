"""A program followed, operation by operation, in branches that change one element of a site's value each (`engine/changed_elements.py`).

The program runs at the draw. Beside each tensor that depends on the site's value stands what it is in the branches: the rules of `_tracing/axes.py`
know which operations keep the elements apart. What cannot be followed raises `Unfollowed`, and the branches run as rows of a plate.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pplgrad.core.shapes import Axis, reshaped
from pplgrad.engine.changed_elements import Changed, ChangedElements, Rows
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._recording import is_recording
from pplgrad.pyro._rerun.leaving_branches import leaving
from pplgrad.pyro._rerun.operations_of_rows import (
    Unfollowed,
    as_type,
    common_type,
    is_reshape,
    name_of,
    of_rows,
    padded,
    product_of_rows,
)
from pplgrad.pyro._tracing.axes import follows, reads_no_element
from pplgrad.pyro._tracing.axis_rules import ARRAYS, NONE, Call
from pplgrad.pyro._tracing.escapes import Leaving
from pplgrad.pyro._tracing.operations import facts_of, is_view, operands_of, tensors_in
from pplgrad.pyro._tracing.storage_axes import key_of

# Operations that give finite numbers where they get finite ones. A difference of infinite numbers would be none.
_FINITE = set(
    "abs add bitwise_and bitwise_not bitwise_or bitwise_xor cat clamp clamp_max clamp_min clone _to_copy cos cumsum embedding eq erf floor ge "
    "gt index le logical_and logical_not logical_or lt maximum minimum mul ne neg relu round rsub scalar_tensor sigmoid sign sin sub "
    "stack sum tanh where".split()
)
_BROADCASTING = set("where binary_cross_entropy_with_logits _to_copy clone rsub detach alias".split())
_OF_ONE_SHAPE = {"binary_cross_entropy_with_logits"}
_PASSED_ON = set("detach alias lift_fresh".split())

State = Changed | Rows


class ChangedRun(TorchDispatchMode):
    """While active, follows what depends on a site's value in all branches that change one element of it."""

    def __init__(
        self, drawn: torch.Tensor, others: torch.Tensor, axes: Sequence[int], numbers: torch.Tensor | None
    ) -> None:
        """`numbers` are those of the branches; None stands for all, in order."""
        super().__init__()
        self._branches = ChangedElements(OPS, [drawn.shape[at] for at in axes], len(others), numbers, drawn)
        # A tensor of its own: nothing else has its memory. A freed tensor's identity may be given to another, so all are kept alive.
        self.value = drawn.clone()
        self._known: dict[int, tuple[torch.Tensor, State]] = {}
        self._storages: set[int] = set()
        self.failed = False
        self.rounding = 0.0
        """That of the coarsest type of numbers that were computed."""
        self._keep(self.value, self._branches.value(self.value, others, axes))
        # What refers back to this is there only while it is active.
        self._leaving: Leaving | None = None

    def __enter__(self) -> ChangedRun:
        self._leaving = leaving(self._is_followed, self._stop)
        self._leaving.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        assert self._leaving is not None
        self._leaving.__exit__(*exc)
        self._leaving = None

    def _is_followed(self, x: torch.Tensor) -> bool:
        return id(x) in self._known or key_of(x) in self._storages

    def _stop(self) -> None:
        self.failed = True  # The program may catch the error.
        raise Unfollowed

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a tensor is in each branch, (branches, *shape)."""
        known = self._known.get(id(x))
        return x.expand(self._branches.count, *x.shape) if known is None else self._branches.rows(known[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        out, taken = func(*args, **kwargs), tensors_in((args, kwargs))
        if self._leaving is not None:
            for x in taken:
                self._leaving.note(x)
        if reads_no_element(func) or not any(self._is_followed(x) for x in taken):
            return out
        try:
            if any(id(x) not in self._known and key_of(x) in self._storages for x in taken):
                raise Unfollowed  # The elements of a followed tensor, handed on by no operation.
            self._follow(func, args, kwargs, out)
        except (Unfollowed, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            self.failed = True  # The program may catch the error.
            raise Unfollowed from error
        return out

    def _keep(self, x: torch.Tensor, state: State) -> None:
        shape = state.drawn.shape if isinstance(state, Changed) else state.array.shape[1:]
        if shape != x.shape:
            raise Unfollowed
        self._known[id(x)] = (x, state)
        if x.dtype.is_floating_point or x.dtype.is_complex:
            self.rounding = max(self.rounding, torch.finfo(x.dtype).eps)
        if key := key_of(x):
            self._storages.add(key)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        facts = facts_of(func)
        if facts.reads:
            self._compare_read(args)
            return
        if facts.random or facts.written or facts.sets or facts.undeclared:
            raise Unfollowed
        if any(id(x) in self._known for x in tensors_in(kwargs)):
            raise Unfollowed
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        states = self._states(args)
        rules = (self._beside, self._summed, self._decided, self._contracted)
        found = None
        if all(isinstance(state, Changed) for state in states):
            found = next((x for rule in rules if (x := rule(func, args, kwargs, outs)) is not None), None)
        for x, state in zip(outs, found or self._row_by_row(func, args, kwargs, outs), strict=True):
            self._keep(x, state)

    def _compare_read(self, args: Any) -> None:
        """Let Python read a number that is the same in all branches, such as whether all values are in a support."""
        if is_recording():  # What is recorded reads nothing but in the hosts' checks, which a compiled step leaves out.
            return
        for x in tensors_in(args):
            if id(x) in self._known and not bool((self.rows(x) == x).all()):
                raise Unfollowed

    def _state(self, x: Any) -> State | None:
        known = self._known.get(id(x)) if isinstance(x, torch.Tensor) else None
        return None if known is None else known[1]

    def _states(self, args: Any) -> list[State]:
        """Return what is followed of an operation's arguments."""
        return [state for x in tensors_in(args) if (state := self._state(x)) is not None]

    def _beside(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> list[State] | None:
        """Return the outputs of an operation that keeps the elements apart: at the draw, and where all are changed."""
        found, call = [], Call(func, args, kwargs)
        for out in outs:
            places = {
                _moved(call, x, place, out, state.axes)
                for place, x in operands_of(func, args, kwargs)
                if isinstance(state := self._state(x), Changed)
            }
            if len(places) != 1 or None in places:
                return None
            found.append(next(iter(places)))
        others = [self._at_others(func, args, kwargs, j) for j in range(self._branches.each)]
        states = self._states(args)
        is_finite = _keeps_finite(func) and all(state.is_finite for state in states)  # type: ignore[union-attr]
        stacked = [torch.stack([one[i] for one in others]) for i in range(len(outs))]
        return [Changed(*each, is_finite) for each in zip(outs, stacked, found, strict=True)]  # type: ignore[arg-type]

    def _at_others(self, func: Any, args: Any, kwargs: Any, alternative: int) -> list[torch.Tensor]:
        """Return an operation's outputs where every element takes an alternative."""
        in_order = is_reshape(func)

        def changed(x: Any) -> Any:
            state = self._state(x)
            if not isinstance(state, Changed):
                return x
            return state.others[alternative].contiguous() if in_order else state.others[alternative]

        leaves, form = tree_flatten(args)
        out = func(*tree_unflatten([changed(x) for x in leaves], form), **kwargs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    def _summed(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> list[State] | None:
        """Return a sum over the elements: that of the unchanged ones, and the changed entry."""
        if name_of(func) != "sum":
            return None
        x, out = self._state(args[0]), outs[0]
        assert isinstance(x, Changed)
        found = self._sum(
            Changed(x.drawn.to(out.dtype), x.others.to(out.dtype), x.axes, False), Call(func, args, kwargs)
        )
        return None if found is None else [found]

    def _sum(self, x: Changed, call: Call) -> Rows | None:
        ndim, given = x.drawn.dim(), call["dim"] if call.has("dim") else None
        dims = [given] if isinstance(given, int) else given or range(ndim)
        return self._branches.sum_over(x, {at % ndim for at in dims}, bool(call.has("keepdim") and call["keepdim"]))

    def _decided(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> list[State] | None:
        """Return whether all or any of the elements are so, by counting the ones that are not, or are."""
        name = name_of(func).strip("_").removeprefix("is_").removesuffix("_true")
        if name not in ("all", "any"):
            return None
        x = self._state(args[0])
        assert isinstance(x, Changed)
        drawn, others = ((a == 0 if name == "all" else a != 0).to(torch.int64) for a in (x.drawn, x.others))
        found = self._sum(Changed(drawn, others, x.axes, False), Call(func, args, kwargs))
        if found is None:
            return None
        return [Rows((found.array == 0 if name == "all" else found.array > 0).to(outs[0].dtype))]

    def _contracted(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> list[State] | None:
        """Return a product that contracts the elements: that at the draw, and the difference of each entry times its row."""
        first = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}.get(name_of(func))
        if first is None or (first and self._state(args[0]) is not None):
            return None
        sides = [self._state(x) for x in args[first : first + 2]]
        if all(side is not None for side in sides):
            return None
        side = 0 if sides[0] is not None else 1
        x, fixed = sides[side], args[first + 1 - side]
        assert isinstance(x, Changed)
        at = x.drawn.dim() - (1 if side == 0 or x.drawn.dim() == 1 else 2)
        if not (x.is_finite and _is_all_of(x.axes, at, x.drawn.shape[at])):
            return None
        rows = self._products(x, fixed, side, at)
        alpha = kwargs.get("alpha", 1)
        found = outs[0] + (rows if alpha == 1 else alpha * rows)
        if not (is_recording() or bool(torch.isfinite(found).all())):
            return None  # A difference of infinite numbers, of the draw or of what it is multiplied with.
        return [Rows(found)]

    def _products(self, x: Changed, fixed: torch.Tensor, side: int, at: int) -> torch.Tensor:
        """Return the difference that each branch makes to a product, (branches, *shape of the product)."""
        moves = self._branches.of_elements((x.others - x.drawn).to(fixed.dtype).movedim(at + 1, -1))
        along = fixed.dim() - (1 if side == 1 or fixed.dim() == 1 else 2)
        taken = self._branches.of_each(fixed.movedim(along, -1))
        # (branches, [batch], rows) and (branches, [batch], columns).
        if fixed.dim() == 1:
            return moves * taken[:, None]
        if x.drawn.dim() == 1:
            return moves[:, None] * taken
        pair = (moves, taken) if side == 0 else (taken, moves)
        return pair[0][..., :, None] * pair[1][..., None, :]

    def _row_by_row(self, func: Any, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> list[State]:
        """Return the outputs of an operation in each branch."""
        leaves, form = tree_flatten(args)
        states = [self._state(x) for x in leaves]
        rows = [x if state is None else self._branches.rows(state) for x, state in zip(leaves, states, strict=True)]
        if torch.Tag.pointwise in func.tags or name_of(func) in _BROADCASTING:
            ndim = max(x.dim() for x in leaves if isinstance(x, torch.Tensor))
            kind = common_type([x for x in leaves if isinstance(x, torch.Tensor)])
            rows = [
                x if state is None else padded(as_type(x, kind), ndim) for x, state in zip(rows, states, strict=True)
            ]
            if name_of(func) in _OF_ONE_SHAPE:
                count = self._branches.count
                rows = [x.expand(count, *outs[0].shape) if isinstance(x, torch.Tensor) else x for x in rows]
            found = func(*tree_unflatten(rows, form), **kwargs)
            return [Rows(found.expand(-1, *outs[0].shape).to(outs[0].dtype))]
        given = tree_unflatten(rows, form)
        product = product_of_rows(func, given, kwargs, [state is not None for state in states], outs[0])
        if product is not None:
            return [Rows(product)]
        if [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)] == [0] and not kwargs:
            found = of_rows(func, args, rows[0], outs)
            return [Rows(x) for x in ([found] if isinstance(found, torch.Tensor) else found)]
        raise Unfollowed


def _keeps_finite(func: Any) -> bool:
    """Return whether an operation gives finite numbers where it gets finite ones.

    What is recorded cannot look at a product later: `where` may let in an infinity that stands in the program.
    """
    name = name_of(func)
    return is_view(func) or (name in _FINITE and not (name == "where" and is_recording()))


def _moved(
    call: Call, x: torch.Tensor, place: int, out: torch.Tensor, axes: tuple[Axis, ...]
) -> tuple[Axis, ...] | None:
    """Return where the elements' axes are in a result, if they are there."""
    name = name_of(call.func)
    if is_reshape(call.func):
        found = [reshaped(axis, tuple(x.shape), tuple(out.shape)) for axis in axes]
        return None if None in found else tuple(found)  # type: ignore[arg-type]
    if is_view(call.func):
        if name == "expand":
            return tuple(axis._replace(at=axis.at + out.dim() - x.dim()) for axis in axes)
        if name in _PASSED_ON:
            return axes
        rule = ARRAYS.get(f"{name}_copy")
        lines = None if rule is None else rule(call, x, place, out)
    else:
        lines = follows(call, x, place, out)
    if lines is None:
        return None
    found = []
    for axis in axes:
        there = [i for i, line in enumerate(lines) if line == axis.at and line != NONE]
        if len(there) != 1 or out.shape[there[0]] != x.shape[axis.at]:
            return None
        found.append(axis._replace(at=there[0]))
    return tuple(found)  # type: ignore[arg-type]


def _is_all_of(axes: Sequence[Axis], at: int, size: int) -> bool:
    """Return whether a dimension holds the elements alone, in their order."""
    inner = [prod(axis.size for axis in axes[i + 1 :]) for i in range(len(axes))]
    return (
        all(axis.at == at for axis in axes) and inner == [a.inner for a in axes] and prod(a.size for a in axes) == size
    )
