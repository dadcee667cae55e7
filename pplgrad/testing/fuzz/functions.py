"""The functions that a random program's terms call, as source: the same names in both libraries.

A function stands above the program that calls it, and only there. `DETOURS` return the number that they get, by a way that is not the library's
own operations; `OPAQUE` functions hold numbers of their own.
"""

from __future__ import annotations

_PYRO = """
def array(x): return torch.tensor(float(x) if isinstance(x, str) else x)
def number(z): return z.double()
def whole_number(z): return z.long()
def take(x, index, dim): return x.index_select(dim, index)
def gather(x, k, dim): return x.gather(dim, k.long())
def stack(*xs): return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, xs)), -1)
def where(c, a, b): return torch.where(c > 0.5, a, b)
def more(x, than): return (x > than).double()
def branch(c, yes, no): return yes() if c.item() > 0.5 else no()
def total(x, dim): return x.sum(dim, keepdim=True)
def flip(x, dim): return x.flip(dim)
def shift(x, dim): return x.roll(1, dim)
def first(x, dim): return x.narrow(dim, 0, 1)
def last(x, dim): return x.narrow(dim, -1, 1)
def sums(x, dim): return x.cumsum(dim)
def mix(x, dim): return (x.movedim(dim, -1) @ array(MATRIX[x.shape[dim]])).movedim(-1, dim)
def tanh(x): return x.tanh()
def sin(x): return x.sin()
def square(x): return x * x
"""

_NUMPYRO = """
def array(x): return jnp.asarray(float(x) if isinstance(x, str) else x)
def number(z): return z.astype(float)
def whole_number(z): return z.astype(int)
def take(x, index, dim): return jnp.take(x, index, axis=dim)
def gather(x, k, dim): return jnp.take_along_axis(x, k.astype(int), axis=dim)
def stack(*xs): return jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, xs)), -1)
def where(c, a, b): return jnp.where(c > 0.5, a, b)
def more(x, than): return (x > than).astype(float)
def branch(c, yes, no): shape = jnp.broadcast_shapes(*(jnp.shape(jax.eval_shape(f)) for f in (yes, no))); return jax.lax.cond(c.reshape(()) > 0.5, *(lambda f=f: jnp.broadcast_to(f(), shape) for f in (yes, no)))
def total(x, dim): return x.sum(dim, keepdims=True)
def flip(x, dim): return jnp.flip(x, dim)
def shift(x, dim): return jnp.roll(x, 1, dim)
def first(x, dim): return jax.lax.slice_in_dim(x, 0, 1, axis=dim)
def last(x, dim): return jax.lax.slice_in_dim(x, -1, None, axis=dim)
def sums(x, dim): return jnp.cumsum(x, dim)
def mix(x, dim): return jnp.moveaxis(jnp.moveaxis(x, dim, -1) @ array(MATRIX[x.shape[dim]]), -1, dim)
def tanh(x): return jnp.tanh(x)
def sin(x): return jnp.sin(x)
def square(x): return x * x
"""

_PYRO_DETOURS = """
def legacy(z): return torch.Tensor([z]).double().reshape(z.shape)
def legacy_float(z): return torch.FloatTensor([z]).double().reshape(z.shape)
def new(z): return torch.zeros(1).new([z]).reshape(z.shape)
def copied_data(z): return torch.tensor([float(z)]).reshape(z.shape)
def by_list(z): return torch.as_tensor(z.tolist()).reshape(z.shape)
def by_numpy(z): return torch.from_numpy(z.detach().numpy().copy()).reshape(z.shape)
def by_array_protocol(z): return torch.tensor(np.asarray(z.detach())).reshape(z.shape)
def by_index(z): k = z.long().reshape(()); return torch.eye(2)[:, [k, k]][1, 0].reshape(z.shape)
def by_python_table(z): return torch.tensor([0.0, 1.0][int(z)]).reshape(z.shape)
def pickled(z): return pickle.loads(pickle.dumps(z.detach()))
def saved(z): torch.save(z.detach(), file := io.BytesIO()); file.seek(0); return torch.load(file)
def by_dlpack(z): return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(z.detach()))
def in_thread(z): return POOL.submit(lambda: z * 1.0).result()
def by_text(z): return torch.tensor(float(f'{float(z):.1f}')).reshape(z.shape)
def filled(z): return torch.full(z.shape, float(z))
def written(z): y = torch.zeros(z.shape); y[...] = z; return y
def into_out(z): return torch.mul(z.detach(), 1.0, out=torch.zeros(z.shape))
def by_storage(z): return torch.tensor(list(z.detach().clone().untyped_storage()), dtype=torch.uint8).view(torch.float64).reshape(z.shape)
def by_data(z): return z.data * 1.0
def by_set(z): y = torch.zeros(z.shape); y.set_(z.detach()); return y
def deep_copied(z): return copy.deepcopy(z.detach())
def by_buffer(z): return torch.frombuffer(bytearray(z.detach().numpy().tobytes()), dtype=torch.float64).reshape(z.shape)
def by_loop(z): return torch.tensor(float(sum(1 for _ in range(int(z))))).reshape(z.shape)
def by_nonzero(z): return torch.tensor(float(len(z.reshape(-1).nonzero()))).reshape(z.shape)
"""

_NUMPYRO_DETOURS = """
def by_callback(z): return jax.pure_callback(lambda x: np.asarray(x, z.dtype), jax.ShapeDtypeStruct(z.shape, z.dtype), jax.lax.stop_gradient(z), vmap_method='sequential')
def by_barrier(z): return jax.lax.optimization_barrier(z)
def stopped(z): return jax.lax.stop_gradient(z)
def by_bits(z): return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(jax.lax.stop_gradient(z), jnp.uint64), z.dtype)
def by_while(z): return jax.lax.while_loop(lambda c: c < jax.lax.stop_gradient(z).max(), lambda c: c + 1.0, 0.0).reshape(z.shape)
def by_switch(z): return jax.lax.switch(z.astype(int).reshape(()), [lambda: 0.0, lambda: 1.0]).reshape(z.shape)
def by_sort(z): return jnp.sort(jnp.stack([z, z + 2.0]), axis=0)[0]
def by_key(z): return jax.random.bits(jax.random.key(z.astype(int).reshape(()))).astype(float).reshape(z.shape) * 0.0 + z
def written(z): return jnp.zeros(z.shape).at[...].set(z)
def by_counting(z): return jnp.sum(jnp.arange(3) < z.reshape(())).astype(float).reshape(z.shape)
def by_vmap(z): return jax.vmap(lambda x: x * 1.0)(z[None])[0]
"""

_PYRO_OPAQUE = {
    "plain": "def {name}(x): return sum(torch.tanh(c * x) + c / 2 for c in {numbers})",
    "inner_jit": "def {name}(x, numbers=torch.tensor({numbers})): x = torch.as_tensor(x)[..., None]; return (torch.tanh(numbers * x) + numbers / 2).sum(-1)",
    "own_derivative": """
class {name}_class(torch.autograd.Function):
    numbers = torch.tensor({numbers})

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (torch.tanh({name}_class.numbers * x[..., None]) + {name}_class.numbers / 2).sum(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        c = {name}_class.numbers
        return g * (c * (1 - torch.tanh(c * x[..., None]) ** 2)).sum(-1)


def {name}(x): return {name}_class.apply(x)
""",
    "own_adjoint": "def {name}(x): return torch.func.vmap(lambda c: torch.tanh(c * x) + c / 2)(torch.tensor({numbers})).sum(0)",
    "looped": "def {name}(x): return torch.utils.checkpoint.checkpoint(lambda y: sum(torch.tanh(c * y) + c / 2 for c in {numbers}), x, use_reentrant=False)",
    "scripted": "def {name}(x): return torch.stack([torch.tanh(c * x) + c / 2 for c in torch.tensor({numbers}).unbind()]).sum(0)",
}

_JAX_INNER = "{name}_numbers = np.asarray({numbers})\n{name}_inner = jax.jit(lambda x: (jnp.tanh({name}_numbers * x[..., None]) + {name}_numbers / 2).sum(-1))\n"

_NUMPYRO_OPAQUE = {
    "plain": "def {name}(x): return sum(jnp.tanh(c * x) + c / 2 for c in {numbers})",
    "inner_jit": _JAX_INNER + "def {name}(x): return {name}_inner(x)",
    "own_derivative": _JAX_INNER
    + "{name} = jax.custom_jvp(lambda x: {name}_inner(x))\n"
    + "{name}.defjvp(lambda p, t: ({name}_inner(*p), jax.jvp({name}_inner, p, t)[1]))\n",
    "own_adjoint": _JAX_INNER
    + "{name} = jax.custom_vjp(lambda x: {name}_inner(x))\n"
    + "{name}.defvjp(lambda x: ({name}_inner(x), x), lambda x, g: jax.vjp({name}_inner, x)[1](g))\n",
    "looped": "def {name}(x, numbers=np.asarray({numbers})): return jax.lax.scan(lambda s, c: (s + jnp.tanh(c * x) + c / 2, None), jnp.zeros(jnp.shape(x)), jnp.asarray(numbers))[0]",
    "scripted": "def {name}(x, numbers=np.asarray({numbers})): return jax.checkpoint(lambda y: (jnp.tanh(jnp.asarray(numbers) * y[..., None]) + jnp.asarray(numbers) / 2).sum(-1))(x)",
}

OPAQUE_WAYS: tuple[str, ...] = tuple(_PYRO_OPAQUE)


def _named(text: str) -> dict[str, str]:
    """Return the definitions in a text, a line each, by their names, as several lines."""
    found = {}
    for line in text.strip().splitlines():
        head, body = line.split(": ", 1)
        found[head[4 : head.index("(")]] = head + ":\n    " + body.replace("; ", "\n    ")
    return found


FUNCTIONS: dict[str, dict[str, str]] = {"pyro": _named(_PYRO), "numpyro": _named(_NUMPYRO)}
DETOURS: dict[str, dict[str, str]] = {"pyro": _named(_PYRO_DETOURS), "numpyro": _named(_NUMPYRO_DETOURS)}
"""By library and name; in the other library a detour is a way straight through."""


def opaque(library: str, way: str, name: str, numbers: tuple[float, ...]) -> str:
    """Return the definition of an opaque function."""
    table = _PYRO_OPAQUE if library == "pyro" else _NUMPYRO_OPAQUE
    return table[way].replace("{name}", name).replace("{numbers}", repr(list(numbers)))


def detour(library: str, way: str) -> str:
    """Return the definition of a detour; of the other library's it is the identity."""
    return DETOURS[library].get(way, f"def {way}(z):\n    return z")
