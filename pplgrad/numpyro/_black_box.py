"""`black_box` for NumPyro programs: a NumPy function that compiled code calls back, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.engine.black_box import CalledBack, is_halved


def black_box(
    function: Callable[..., Any],
    *values: Any,
    event_dim: int | tuple[int, ...] = 0,
    vectorized: bool = False,
    shape: tuple[int, ...] = (),
) -> jax.Array:
    r"""Return the values of a NumPy function on each element: a simulator, a reward, a score from another library.

    Computes y_i = f(x_i, x'_i, ...) for each element i of the batch, without a gradient: ∂y/∂x counts as 0. Use estimators that need no
    gradient there, such as `ScoreFunction` and `LocalExpectation`. A relaxed site is refused. `Reparam` is biased at a site whose value
    reaches the function.

    Element i of the result reads element i of each value and nothing else, and provenance tracking records this: elements of a plate stay
    independent.

    Args:
        function: f, a function of NumPy arrays (of numbers for `event_dim=0`). It is called once for each element.
        values: its arguments, arrays.
        event_dim: the number of event dimensions of each value, one number for all or a tuple with one for each. Default: 0.
        vectorized: True calls the function once with whole arrays of shape (n, \*event); it returns (n, \*shape). Default: False.
        shape: the shape of the result for one element. Default: (), a number.

    Returns:
        An array in the default floating type.

    Shapes:
        Values have shape (\*batch, \*event), and their batch shapes broadcast. The result has shape (\*batch, \*shape). Axes that `vmap` and
        particles add are part of the batch.

    Assumptions:
        The function computes the same from the same values. With `vectorized=True` row i of its result depends on row i alone; this is
        checked for some rows, at the 1st, 2nd, 4th, 8th, ... call of each trace.

    Raises:
        ProgramError: `function` is not callable, or shapes do not fit. What is found while compiled code runs (a result of another shape or
            kind, rows that are mixed) is raised by JAX as an error of its own, with the same message.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> black_box(np.cumsum, jnp.array([[1.0, 2.0], [3.0, 4.0]]), event_dim=1, shape=(2,)).tolist()
        [[1.0, 3.0], [3.0, 7.0]]

    References:
        `jax.pure_callback`, with declared dependencies.
    """
    # Nothing is known of the function's derivative, and JAX has none for a callback.
    arrays = [jax.lax.stop_gradient(jnp.asarray(x)) for x in values]
    dtype, kinds = jnp.result_type(float), [x.dtype for x in arrays]
    box = CalledBack(function, [x.shape for x in arrays], event_dim, vectorized, shape, dtype, kinds=kinds)
    # JAX calls back in a thread of its own, where numbers of 64 bits are cut if `enable_x64` is on around this program alone.
    sent = [jax.lax.bitcast_convert_type(x, jnp.uint32) if h else x for x, h in zip(arrays, box.halved, strict=True)]
    wide, whole = is_halved(dtype), box.batch + box.shape
    result = jax.ShapeDtypeStruct((*whole, 2), jnp.uint32) if wide else jax.ShapeDtypeStruct(whole, dtype)
    # Under `vmap` a value that is not mapped has an axis of size 1, and is not copied.
    found = jax.pure_callback(box, result, *sent, vmap_method="expand_dims")
    return jax.lax.bitcast_convert_type(found, dtype) if wide else found
