"""`black_box` for NumPyro programs: a NumPy function that compiled code calls back, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.engine.black_box import Counted


def black_box(
    function: Callable,
    *values: Any,
    event_dim: int | tuple[int, ...] = 0,
    vectorized: bool = False,
    shape: tuple[int, ...] = (),
) -> jax.Array:
    r"""Return what a NumPy function computes of each element: a simulator, a reward, a score from another library.

    y_i = f(x_i, x'_i, ...) for each element i of the batch, without a gradient: ∂y/∂x counts as 0. Use estimators that need none there,
    such as `ScoreFunction` and `LocalExpectation`; a relaxed site is refused, and `Reparam` at a site whose value gets here is biased.

    Element i of the result reads element i of each value and nothing else, and is charged so: elements of a plate stay
    apart. The function is called once for each element, with NumPy arrays (numbers for `event_dim=0`). With `vectorized=True` it
    is called once with whole arrays of shape (n, \*event), returns (n, \*shape), and promises that row i depends on row i alone; that is
    checked in some rows at the 1st, 2nd, 4th, 8th, ... call of each trace. It computes the same from the same values.

    Shapes: values (\*batch, \*event), where `event_dim` is the number of event dimensions, for all or one for each, and batch
    shapes broadcast; the result (\*batch, \*shape), in the default floating type. What `vmap` and particles add is batch.

    Raises `ProgramError` for what is no function, and for shapes that do not fit. What is found out while compiled code runs (a result of
    another shape or kind, rows that are mixed) JAX hands on as a `JaxRuntimeError` with the same words.

    >>> import jax.numpy as jnp, numpy as np
    >>> black_box(np.cumsum, jnp.array([[1.0, 2.0], [3.0, 4.0]]), event_dim=1, shape=(2,)).tolist()
    [[1.0, 3.0], [3.0, 7.0]]

    Source: `jax.pure_callback`, with what depends on what declared.
    """
    # Nothing is known of the function's derivative, and JAX has none for a callback.
    arrays = [jax.lax.stop_gradient(jnp.asarray(x)) for x in values]
    dtype = jnp.result_type(float)
    box = Counted(function, [x.shape for x in arrays], event_dim, vectorized, shape, dtype)
    result = jax.ShapeDtypeStruct(box.batch + box.shape, dtype)
    # Under `vmap` a value that is not mapped has an axis of size 1, and is not copied.
    return jax.pure_callback(box, result, *arrays, vmap_method="expand_dims")
