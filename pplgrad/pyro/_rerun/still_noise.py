"""Random numbers that are drawn outside of sample sites (dropout, say), made the same whatever the shape in which they are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten

_NOISE = frozenset(
    "rand randn rand_like randn_like randint randint_like uniform_ normal_ exponential_ log_normal_ cauchy_ geometric_ random_ bernoulli_".split()
)
"""Operations whose numbers do not depend on the elements of another tensor."""
_OF_FIRST = frozenset((
    aten.bernoulli.default, aten.poisson.default, aten._standard_gamma.default, aten.normal.Tensor_float, aten.normal.Tensor_Tensor
))  # fmt: skip
"""Operations whose draws have one element for each of the first tensor's, which takes their place."""


class StillNoise(TorchDispatchMode):
    """Gives every element of what is random the same number, or the parameter that it is drawn with.

    A density then depends on the values of the sites alone. Operations that are not known here stay random.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation, and put something still in the place of what is random."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        if func in _OF_FIRST:
            return args[0].clone()
        if func is aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if func is aten.bernoulli_.Tensor:
            return args[0].copy_(args[1])
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _NOISE:
            found.fill_(0.5 if found.dtype.is_floating_point else 0)
        return found
