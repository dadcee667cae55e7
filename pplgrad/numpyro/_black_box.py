"""`black_box` for NumPyro programs: a NumPy function that compiled code calls back, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.engine.black_box import CalledBack, is_halved


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
    another shape or kind, rows that are mixed) JAX hands on as an error of its own with the same words.

    >>> import jax.numpy as jnp, numpy as np
    >>> black_box(np.cumsum, jnp.array([[1.0, 2.0], [3.0, 4.0]]), event_dim=1, shape=(2,)).tolist()
    [[1.0, 3.0], [3.0, 7.0]]

    Source: `jax.pure_callback`, with what depends on what declared.
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
