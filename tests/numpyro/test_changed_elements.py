"""Branches that change one element each: what is computed once for all of them is what a program run for each of them gives."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad.engine import changed_elements as shared
from pplgrad.numpyro import OneHotCategorical, TraceGrad_ELBO
from pplgrad.numpyro._rerun import changed_elements
from pplgrad.numpyro._rerun.changed_elements import by_rows, evaluated
from tests.branching import OF_ELEMENTS

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4)  # a plate, and two dimensions of elements
DRAWN = RNG.integers(0, 3, SHAPE)
OTHERS = np.stack([(DRAWN + 1) % 3, (DRAWN + 2) % 3])
W, U, V = RNG.normal(size=(4, 5)), RNG.normal(size=(3, 4, 5)), RNG.normal(size=SHAPE)
TABLE = RNG.normal(size=(3, 6))


HALF = np.linspace(0.01, 1.0, 60).reshape(12, 5)


def product(z, kind, wide):
    """Return a product of small integers that is summed up in a wider type."""
    weights = (jnp.arange(60) % 7).astype(kind).reshape(12, 5)
    numbers = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(z.astype(kind).reshape(2, 12), weights, numbers, preferred_element_type=wide)


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda point, move: (doubled(point[0]), 2 * move[0]))


def loop(z):
    return jax.lax.scan(lambda carry, row: (carry + row.sum() * carry.mean(), carry), jnp.ones(4), z)[1]


PROGRAMS = {
    "density": lambda z: (z * V - jnp.logaddexp(0.0, V)).sum((-1, -2)),
    "density, the last dimension first": lambda z: (jnp.exp(V * z)).sum(-1).sum(-1),
    "density, flattened": lambda z: (z * V).reshape(2, -1).sum(-1),
    "flattened and contracted": lambda z: jnp.tanh(z * 1.0).reshape(2, -1) @ U.reshape(12, 5),
    "contracted": lambda z: jnp.einsum("bij,ijk->bk", 2.0 * z - 1.0, U),
    "contracted, the other way round": lambda z: jnp.einsum("ijk,bij->kb", U, 2.0 * z - 1.0),
    "contracted in one dimension": lambda z: jnp.tanh(z @ W).sum((1, 2)),
    "contracted with another plate": lambda z: jnp.einsum("bij,bijk->bk", z * 1.0, jnp.broadcast_to(U, (2, 3, 4, 5))),
    "two layers": lambda z: jnp.tanh(jnp.einsum("bij,ijk->bk", z * 2.0 - 1.0, U)) @ W.T,
    "nonlinear before the product": lambda z: jnp.einsum("bij,ijk->bk", jnp.exp(z * 0.3), U),
    "squared product": lambda z: jnp.einsum("bij,bij->b", z * V, z * 1.0),
    "embedded": lambda z: jnp.asarray(TABLE)[z].sum((1, 2)),
    "table of each element": lambda z: jnp.take_along_axis(jnp.asarray(np.stack([V] * 3, -1)), z[..., None], -1)[
        ..., 0
    ].sum((1, 2)),
    "one-hot": lambda z: jnp.einsum("bijc,ijk->bk", jax.nn.one_hot(z, 3), U),
    "transposed": lambda z: (jnp.swapaxes(z, 1, 2) * np.swapaxes(V, 1, 2)).sum((1, 2)),
    "over the plate too": lambda z: (z * V).sum(),
    "over the plate alone": lambda z: jnp.exp((z * V).sum(0)).sum(),
    "cumulated": lambda z: jnp.cumsum(z * V, 1).sum((1, 2)),
    "sorted": lambda z: (jnp.sort(z * V, -1) * V).sum((1, 2)),
    "largest": lambda z: (z * V).max((1, 2)),
    "whether any": lambda z: jnp.where((z == 2).any(-1), 1.0, V[..., 0]).sum(-1),
    "between elements": lambda z: (z[..., 1:] * z[..., :-1]).sum((1, 2)) * 1.0,
    "own derivative": lambda z: doubled(z * V).sum((1, 2)),
    "relu": lambda z: jax.nn.relu(z * V - 0.5).sum((1, 2)),
    "jitted": lambda z: jax.jit(lambda x: (x * V).sum((1, 2)))(z),
    "a loop": lambda z: jax.vmap(loop)(z * 0.1).sum((1, 2)),
    "a condition": lambda z: jax.lax.cond(z.sum() > 20, lambda x: x * 1.0, lambda x: x * V, z).sum((1, 2)),
    "nothing of it": lambda z: jnp.ones(2) * V.sum(),
    "itself": lambda z: z,
    "infinite": lambda z: jnp.where(z == 1, -jnp.inf, z * V).sum((1, 2)),
    "infinite and contracted": lambda z: jnp.einsum("bij,ijk->bk", jnp.log(z * 1.0), np.abs(U)),
    "integers": lambda z: z.sum((1, 2)),
    "small integers in a product of larger ones": lambda z: product(z * 100 - 100, jnp.int8, jnp.int32),
    "integers without a sign in a product with one": lambda z: product(z, jnp.uint8, jnp.int32),
    "integers in a product of floats": lambda z: product(z, jnp.uint8, jnp.float32) * 1.0,
    "a power that is infinite": lambda z: jax.nn.sigmoid((z * 1.0).reshape(2, -1) ** -1 @ HALF),
    "a table that is infinite": lambda z: jax.nn.sigmoid(jnp.array([-jnp.inf, 1.0, 2.0])[z].reshape(2, -1) @ HALF),
    "infinite weights": lambda z: jax.nn.sigmoid((z - 0.5).reshape(2, -1) @ jnp.where(HALF > 0.9, jnp.inf, HALF)),
    "weights of probability 0": lambda z: jax.nn.sigmoid(
        (z - 0.5).reshape(2, -1) @ jnp.log(jnp.maximum(HALF - 0.5, 0))
    ),
    "an infinity that a condition lets in": lambda z: jnp.nan_to_num(
        jnp.where(z == 1, jnp.inf, 1.0).reshape(2, -1) @ HALF, posinf=3.0
    ),
}
AXES = {"both": (1, 2), "the last": (2,), "the middle": (1,), "the plate too": (0, 1, 2)}


def compared(program, axes, numbers=None, find=evaluated):
    closed = jax.make_jaxpr(program)(jnp.asarray(DRAWN))
    count = 2 * int(np.prod([SHAPE[axis] for axis in axes]))
    given = (closed, jnp.asarray(DRAWN), jnp.asarray(OTHERS), axes, np.arange(count) if numbers is None else numbers)
    return find(*given), by_rows(*given)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_run_for_each_branch(name):
    assert_close(*compared(PROGRAMS[name], (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [axes for axes in AXES.values() if axes != (1, 2)], ids=str)
def test_elements_along_other_axes(axes):
    for name in (
        "density",
        "flattened and contracted",
        "contracted in one dimension",
        "one-hot",
        "cumulated",
        "a loop",
    ):
        assert_close(*compared(PROGRAMS[name], axes))


@pytest.mark.slow
def test_of_some_branches_alone():
    for numbers in (np.array([5, 0, 23, 23]), jnp.array([7])):
        assert_close(*compared(PROGRAMS["two layers"], (1, 2), numbers))
        assert_close(*compared(PROGRAMS["density"], (1, 2), numbers))


def test_element_by_element_rows_are_the_ones_asked_for():
    """The oracle: the rows are built with NumPy, entry by entry."""
    rows = []
    for i, j in np.ndindex(3, 4):
        for other in OTHERS:
            row = DRAWN.copy()
            row[:, i, j] = other[:, i, j]
            rows.append(row)
    assert_close(compared(PROGRAMS["itself"], (1, 2))[0], [jnp.asarray(np.stack(rows))])


def sizes_in(closed):
    """Yield the number of entries of every array that a program computes."""
    for equation in closed.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from sizes_in(getattr(inner, "jaxpr", inner))


SPARSE = ("density", "density, flattened", "flattened and contracted", "contracted", "contracted, the other way round")
SPARSE += (
    "contracted with another plate",
    "embedded",
    "table of each element",
    "own derivative",
    "relu",
    "jitted",
    "transposed",
)
SPARSE += ("one-hot", "infinite", "over the plate too", "two layers")


@pytest.mark.parametrize("name", SPARSE)
def test_no_array_of_all_branches_before_a_sum(name):
    """What this is for: no array has all elements of all branches."""
    closed = jax.make_jaxpr(PROGRAMS[name])(jnp.asarray(DRAWN))

    def find(drawn):
        return evaluated(closed, drawn, jnp.asarray(OTHERS), (1, 2), np.arange(24))

    assert max(sizes_in(jax.make_jaxpr(find)(jnp.asarray(DRAWN)).jaxpr)) < 24 * DRAWN.size


UNARY = [
    jnp.tanh,
    jnp.exp,
    lambda x: -x,
    lambda x: jnp.log(jnp.abs(x)),
    lambda x: x**2,
    jax.nn.softplus,
    lambda x: jnp.where(x > 0, x, 0.1),
]


def random_program(rng):
    """Return a program of a value of SHAPE, made of operations drawn one after the other."""
    steps = []
    for _ in range(int(rng.integers(2, 7))):
        kind = int(rng.integers(8))
        constant = rng.normal(size=64)
        steps.append((kind, constant, int(rng.integers(100)), bool(rng.integers(2))))

    def program(z):
        x = z * 1.0
        for kind, constant, choice, flag in steps:
            if kind <= 2 or x.ndim == 0:
                x = UNARY[choice % len(UNARY)](x)
            elif kind == 3:
                other = jnp.resize(constant, x.shape)
                x = x * other if flag else x + other
            elif kind == 4:
                x = x.sum(choice % x.ndim, keepdims=flag)
            elif kind == 5:
                x = jnp.tensordot(x, jnp.resize(constant, (x.shape[choice % x.ndim], 3)), ((choice % x.ndim,), (0,)))
            elif kind == 6:
                x = jnp.moveaxis(x, choice % x.ndim, 0)
            else:
                x = x.reshape(-1, *x.shape[2:]) if flag and x.ndim > 1 else x[None]
        return x

    return program


@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed):
    rng = np.random.default_rng(seed)
    program = random_program(rng)
    axes = list(AXES.values())[seed % len(AXES)]
    found, expected = compared(program, axes)
    for one, other in zip(found, expected, strict=True):
        # A product of infinite numbers may be none where the one row by row is infinite: never another finite one.
        known = np.isfinite(np.asarray(other))
        np.testing.assert_allclose(np.asarray(one)[known], np.asarray(other)[known], rtol=1e-8, atol=1e-8)


# The program that shows it, and what is broken.
MUTANTS = {
    "the drawn entry is summed too": (
        "density",
        shared,
        "_sum_of_others",
        lambda _, x: jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape),
    ),
    "only what comes before is summed": ("density", shared, "_sum_of_others", lambda _, x: jnp.cumsum(x, -1) - x),
    "constants count as finite": (
        "a table that is infinite",
        changed_elements.Branches,
        "_is_finite",
        lambda _, x: getattr(x, "is_finite", True),
    ),
    "powers count as finite": (
        "a power that is infinite",
        changed_elements,
        "_keeps_finite",
        lambda equation: equation.primitive.name in changed_elements._FINITE,
    ),
    "no difference of infinite numbers is left out": (
        "infinite and contracted",
        changed_elements,
        "_FINITE",
        {*changed_elements._FINITE, "exp", "log", "div", "select_n"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch):
    program, *change = MUTANTS[name]
    monkeypatch.setattr(*change)
    both = compared(PROGRAMS[program], (1, 2))
    with pytest.raises(AssertionError):
        assert_close(*both)


X = RNG.normal(size=(2, 3))


def network(family):
    """Return a belief network with a plate of data, two layers in the guide, and sums that come after each."""
    weights, probs = RNG.normal(size=(3, 4, 2)), RNG.dirichlet(np.ones(3), size=(3,))

    def latent(name, logits):
        if family == "binary":
            return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1)) * 1.0
        if family == "counts":
            return numpyro.sample(name, dist.Poisson(jnp.exp(0.3 * logits)).to_event(1))
        if family == "one-hot":
            full = jnp.stack([logits, -logits, 0.5 * logits], -1)
            return numpyro.sample(name, OneHotCategorical(logits=full).to_event(1)) @ jnp.array([0.0, 1.0, 2.5])
        full = jnp.stack([logits, -logits, 0.5 * logits], -1)
        return jnp.array([0.0, 1.0, 2.5])[numpyro.sample(name, dist.Categorical(logits=full).to_event(1))]

    def model(x):
        w = numpyro.param("w", jnp.asarray(weights[:, :, 0]))
        with numpyro.plate("data", 2):
            z = latent("z", jnp.zeros(3))
            h = latent("h", jnp.tanh(z @ w) if family != "counts" else 0.2 * jnp.tanh(z @ w))
            numpyro.sample("x", dist.Normal((0.3 * h) @ w.T, 1.0).to_event(1), obs=x)

    def guide(x):
        q = numpyro.param("q", jnp.asarray(weights[:, :, 1]))
        b = numpyro.param("b", jnp.asarray(probs))
        with numpyro.plate("data", 2):
            z = latent("z", jnp.tanh(x) @ b)
            latent("h", jnp.tanh(z @ q))

    return model, guide


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"max_parallel": 4}], ids=str)
@pytest.mark.parametrize("case", OF_ELEMENTS)
def test_the_gradient_is_the_one_without_it(case, options):
    model, guide = network(case.partition(",")[0])
    key, estimators = jax.random.key(4), {"*": OF_ELEMENTS[case]}
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4))), "q": jnp.asarray(RNG.normal(size=(3, 4))), "b": jnp.eye(3)}
    grads = []
    for fuse in (True, False):
        elbo = TraceGrad_ELBO(estimators=estimators, fuse=fuse, **options)
        grads.append(jax.jit(jax.grad(lambda p, elbo=elbo: elbo.loss(key, p, model, guide, jnp.asarray(X))))(params))
    for name in params:
        np.testing.assert_allclose(grads[0][name], grads[1][name], rtol=1e-9, atol=1e-9, err_msg=name)
