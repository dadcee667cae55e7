"""`black_box` for Pyro programs: a NumPy function that is called, and tracked, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from pplgrad.engine.black_box import BlackBox
from pplgrad.errors import ProgramError, first_line
from pplgrad.pyro._recording import is_recording, reading_refused
from pplgrad.pyro._tracing.axes import NONE
from pplgrad.pyro._tracing.callers import user_line
from pplgrad.pyro._tracing.watchers import watching


def black_box(
    function: Callable[..., Any],
    *values: Any,
    event_dim: int | tuple[int, ...] = 0,
    vectorized: bool = False,
    shape: tuple[int, ...] = (),
) -> torch.Tensor:
    r"""Return the values of a NumPy function on each element: a simulator, a reward, a score from another library.

    Computes y_i = f(x_i, x'_i, ...) for each element i of the batch, without a gradient: ∂y/∂x counts as 0. Use estimators that need no
    gradient there, such as `ScoreFunction` and `LocalExpectation`. A relaxed site is refused. `Reparam` is biased at a site whose value
    reaches the function.

    Element i of the result reads element i of each value and nothing else, and provenance tracking records this: elements of a plate stay
    independent, where `value.numpy()` would make each depend on all.

    Args:
        function: f, a function of NumPy arrays (of numbers for `event_dim=0`). It is called once for each element.
        values: its arguments, tensors.
        event_dim: the number of event dimensions of each value, one number for all or a tuple with one for each. Default: 0.
        vectorized: True calls the function once with whole arrays of shape (n, \*event); it returns (n, \*shape). Default: False.
        shape: the shape of the result for one element. Default: (), a number.

    Returns:
        A tensor in the default floating type.

    Shapes:
        Values have shape (\*batch, \*event), and their batch shapes broadcast. The result has shape (\*batch, \*shape). Vectorized particles
        are part of the batch.

    Assumptions:
        The function computes the same from the same values. With `vectorized=True` row i of its result depends on row i alone; this is
        checked for some rows, in steps that are tracked.

    Raises:
        ProgramError: `function` is not callable, shapes do not fit, the result has another shape or kind, or rows are mixed.
        CompileError: the step is to be compiled; `TraceGrad_ELBO(compile=...)` refuses a black box.

    Example:
        >>> import numpy as np, torch
        >>> black_box(np.cumsum, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), event_dim=1, shape=(2,)).tolist()
        [[1.0, 3.0], [3.0, 7.0]]

    References:
        None outside pplgrad. Dependencies are declared, as by the batch dimensions of a distribution.
    """
    tensors = [torch.as_tensor(x) for x in values]
    dtype = torch.get_default_dtype()
    # NumPy lacks one of torch's short kinds.
    held = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [tuple(x.shape) for x in tensors]
    box = BlackBox(function, shapes, event_dim, vectorized, shape, np.float64 if held == torch.float64 else np.float32)
    if is_recording():
        raise reading_refused(user_line())
    watchers = watching()
    with torch.no_grad(), torch._C.DisableTorchFunction():
        arrays = [_array(x, box) for x in tensors]
        # What the function does inside, with torch perhaps, is its own affair.
        with _disable_current_modes():
            found = box.evaluate(arrays, check=bool(watchers))
        # An operation makes the tensor, so that it is not one of which nothing is known, and NumPy fills it.
        result = torch.empty(found.shape, dtype=held, device="cpu")
        result.numpy()[...] = found
        read = [(x, _follows(x, at, result)) for x, at in zip(tensors, box.places(shapes, found.shape), strict=True)]
        for provenance in watchers:
            provenance.computed(result, read, "black_box")
        return result.to(dtype=dtype, device=tensors[0].device)


def _follows(x: torch.Tensor, places: tuple[int | None, ...], out: torch.Tensor) -> list[int]:
    """Return the axis of a value that each axis of the result follows; one of size 1 is read by all elements."""
    found = [NONE] * out.dim()
    for axis, place in enumerate(places):
        if place is not None and x.shape[axis] == out.shape[place]:
            found[place] = axis
    return found


def _array(x: torch.Tensor, box: BlackBox) -> np.ndarray:
    """Return a tensor's numbers."""
    try:
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)
    except (RuntimeError, TypeError) as error:
        raise ProgramError(
            f"black_box: '{box.name}' got a value whose numbers cannot be read, as inside torch.vmap ({first_line(error)})."
        ) from error
