"""Where the axes of a draw are in what is computed from it: never claimed where another element has an influence."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pplgrad.core.plates import Plate
from pplgrad.numpyro._compat_jax import sub_jaxprs, tag
from pplgrad.numpyro._tracing import axis_rules, provenance
from pplgrad.numpyro._tracing.axis_rules import Axis
from pplgrad.numpyro._tracing.provenance import SitePlates, outputs_read
from tests.numpyro.idioms import IDIOMS, whole


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def claims(function, shape):
    """Return where each axis of an array is said to be in each output of a function: an `Axis` or None."""
    plates = tuple(Plate(f"p{k}", k - len(shape), size, size) for k, size in enumerate(shape))
    closed = jax.make_jaxpr(lambda z: function(tag("z", z)))(jnp.zeros(shape))
    nothing = (None,) * (1 + len(shape))
    found = outputs_read(closed, {"z": SitePlates(plates, 0)})
    return [reads["z"].axes[1:] if "z" in reads else nothing[1:] for reads in found]


def moves(function, shape, seed=0):
    """Return for each axis and each index along it the elements of each output that move with what stands there.

    ParticleOutputs of truth values, (axis, index, output); several other values are tried.
    """
    rng = np.random.default_rng(seed)
    compiled = jax.jit(lambda z: jax.tree.leaves(function(z)))

    def run(z):
        return [np.asarray(x) for x in compiled(z)]

    start = rng.normal(size=shape)
    first = run(start)
    found = {}
    for axis, size in enumerate(shape):
        for index in range(size):
            changed = [np.zeros(x.shape, bool) for x in first]
            for scale in (0.3, 1.0, 5.0):
                other = start.copy()
                place = (slice(None),) * axis + (index,)
                other[place] = rng.normal(size=other[place].shape) * scale
                for seen, x, y in zip(changed, first, run(other), strict=True):
                    seen |= ~((x == y) | ((x != x) & (y != y)))
            found[axis, index] = changed
    return found


def faults(function, shape, seed=0):
    """Return the claims that are wrong: an element moves another one than its own."""
    said, moved = claims(function, shape), moves(function, shape, seed)
    wrong = []
    for (axis, index), changed in moved.items():
        for output, seen in enumerate(changed):
            claim = said[output][axis]
            if claim is None:
                continue
            own = np.arange(seen.shape[claim.at]) // claim.inner % claim.size == index
            if np.moveaxis(seen, claim.at, 0)[~own].any():
                wrong.append((axis, index, output, claim))
    return wrong


@pytest.mark.parametrize("name", IDIOMS)
def test_where_the_axes_are(name):
    """Exactly where they should be: not claimed falsely, and not lost where the rules can follow them."""
    idiom = IDIOMS[name]
    (found, *_) = claims(idiom.function, idiom.shape)
    wanted = tuple(
        None if at is None else Axis(at, 1, size) for at, size in zip(idiom.places, idiom.shape, strict=True)
    )
    assert found == wanted
    assert faults(idiom.function, idiom.shape) == []


def primitives(jaxpr):
    """Yield the names of all operations in a jaxpr, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in sub_jaxprs(equation):
            yield from primitives(inner)


# Named otherwise in other versions of JAX, or made by nothing that users write.
UNTRIED = {"copy", "copy_p", "device_put", "unstack", "scatter-sub"}


def test_every_rule_is_tried():
    tried = set()
    for idiom in IDIOMS.values():
        tried |= set(primitives(jax.make_jaxpr(idiom.function)(jnp.zeros(idiom.shape)).jaxpr))
    # JAX 0.10.0 has no operation of that name.
    absent = {"stack"} - set(primitives(jax.make_jaxpr(lambda x: jnp.stack([x, x]))(0.0).jaxpr))
    assert set(axis_rules._RULES) - set(axis_rules._ELEMENTWISE) - tried <= UNTRIED | absent


# From an array, and the number of an axis where the function has two arguments.
UNARY = {
    "tanh": jnp.tanh,
    "positive": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "transpose": lambda x: x.T,
    "sum": lambda x, a: x.sum(a),
    "sum_kept": lambda x, a: x.sum(a, keepdims=True) + 0 * x,
    "max": lambda x, a: x.max(a),
    "flip": jnp.flip,
    "roll": lambda x, a: jnp.roll(x, 1, a),
    "cumsum": lambda x, a: jnp.cumsum(x, a),
    "sort": lambda x, a: jnp.sort(x, a),
    "softmax": lambda x, a: jax.nn.softmax(x, a),
    "first": lambda x, a: lax.index_in_dim(x, 0, a, keepdims=False),
    "rest": lambda x, a: lax.slice_in_dim(x, 1, None, axis=a) if x.shape[a] > 1 else x,
    "twice": lambda x, a: jnp.concatenate([x, x], a),
    "new_axis": jnp.expand_dims,
    "repeated": lambda x, a: jnp.broadcast_to(jnp.expand_dims(x, a), (*x.shape[:a], 2, *x.shape[a:])),
    "swapped": lambda x, a: jnp.swapaxes(x, a, 0),
    "flat": lambda x: x.reshape(-1),
    "reshaped": lambda x, a: x.reshape(x.shape[a:] + x.shape[:a]),
    "halves": lambda x, a: x.reshape(*x.shape[:a], 2, -1, *x.shape[a + 1 :]) if x.shape[a] % 2 == 0 else x,
    "merged": lambda x, a: x.reshape(*x.shape[:a], -1, *x.shape[a + 2 :]) if a + 1 < x.ndim else x,
    "product": lambda x, a: jnp.tensordot(x, jnp.ones((x.shape[a], 2)) + 0.1, (a, 0)),
    "gram": lambda x, a: jnp.tensordot(x, x, (a, a)),
    "permuted": lambda x, a: jnp.take(x, jnp.arange(x.shape[a])[::-1], a),
    "looked_up": lambda x: jnp.array([0.3, -1.0, 0.7])[whole(x)],
    "along": lambda x, a: jnp.take_along_axis(x, jnp.minimum(whole(x), x.shape[a] - 1), a),
    "set_first": lambda x: x.at[0].set(0.5),
    "added_at": lambda x: jnp.zeros((3, *x.shape)).at[whole(x.reshape(-1)[0])].add(x),
    "mapped": lambda x: lax.map(jnp.cumsum, x) if x.ndim == 2 else x,
    "scanned": lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c + 2 * r), jnp.zeros(x.shape[1:]), x)[1],
    "folded": lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c), jnp.zeros(x.shape[1:]), x)[0],
    "branched": lambda x: lax.cond(x.reshape(-1)[0] > 0, lambda y: y, lambda y: -y, x),
    "looped": lambda x: lax.fori_loop(0, 2, lambda i, y: jnp.sin(y) + y, x),
    "cut_at": lambda x: lax.dynamic_slice_in_dim(x, whole(x.reshape(-1)[0]), 1, 0),
    "in_jit": jax.jit(lambda x: x * jnp.cos(x)),
    "rows": lambda x: jax.vmap(lambda r: r[::-1] if r.ndim else r)(x),
}


BY_AXIS = {name for name, function in UNARY.items() if len(inspect.signature(function).parameters) > 1} - {
    "tanh",
    "in_jit",
}


def random_function(seed):
    """Return a function of an array that applies a few operations picked at random, and the array's shape."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 4, size=rng.integers(1, 4)))
    steps = [(str(rng.choice(list(UNARY))), int(rng.integers(8)), rng.random(), int(rng.integers(8))) for _ in range(7)]

    def function(z):
        pool = [z]
        for name, number, joined, other in steps:
            x = pool[number % len(pool)]
            if x.ndim == 0 or x.ndim > 4 or x.size > 200:
                x = z
            made = UNARY[name](x, number % x.ndim) if name in BY_AXIS else UNARY[name](x)
            partner = pool[other % len(pool)]
            if joined < 0.4 and made.shape == partner.shape:
                made = made + 0.5 * partner
            elif joined < 0.6 and made.ndim and partner.ndim and made.shape[-1] == partner.shape[-1] and made.ndim < 4:
                made = made * (partner if partner.ndim == 1 else made)
            pool.append(made)
        return pool[1:]

    return function, shape


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 150), marks=pytest.mark.slow)], ids=["few", "many"])
def test_no_claim_of_a_random_program_is_wrong(seeds):
    claimed = 0
    for seed in seeds:
        function, shape = random_function(seed)
        assert faults(function, shape, seed) == [], seed
        claimed += sum(axis is not None for axes in claims(function, shape) for axis in axes)
    assert claimed > 2 * len(seeds)


def rule(name, broken):
    """Return a mutant of one operation's rule."""
    return lambda patch: patch.setitem(axis_rules._RULES, name, broken)


def keeps_all(*names):
    """Return a mutant in which operations keep every axis where it is."""

    def apply(patch):
        for name in names:
            patch.setitem(axis_rules._RULES, name, lambda params, shapes, out: [tuple(range(len(s))) for s in shapes])

    return apply


def sizes_unchecked(patch):
    """A place counts although its size is another."""

    def moved(equation, operand, axis):
        places = axis_rules._places(equation)
        place = None if places is None else places[operand][axis.at]
        return None if place is None else axis._replace(at=place)

    patch.setattr(provenance, "moved", moved)


def reshape_by_size(patch):
    """A reshape keeps an axis if another of its size is there."""

    def reshaped(equation, axis):
        after = equation.outvars[0].aval.shape
        return Axis(after.index(axis.size), 1, axis.size) if axis.size in after else None

    patch.setattr(axis_rules, "_reshaped", reshaped)


def contracted_kept(params, shapes, out):
    return [tuple(range(len(shapes[0]))), tuple(None for _ in shapes[1])]


def looked_up_kept(params, shapes, out):
    """What is looked up keeps its first axis, whatever the indices are."""
    places = axis_rules._gathered(params, shapes, out)
    return [(0, *places[0][1:]), places[1]]


def updates_kept(params, shapes, out):
    return [*axis_rules._scattered(params, shapes, out)[:2], tuple(range(len(shapes[2])))]


def kernel_kept(params, shapes, out):
    numbers = params["dimension_numbers"]
    return [
        axis_rules._convolved(params, shapes, out)[0],
        tuple(None if a != numbers.rhs_spec[0] else 0 for a in range(3)),
    ]


def first_of_two(patch):
    """What two operands read in different places is in the first one's place."""
    plain = provenance._joined
    patch.setattr(provenance, "_joined", lambda a, b: plain(a, b)._replace(axes=a.axes))


def carry_of_the_same_element(patch):
    """What is carried on in a scan along a plate counts as the next element's own."""
    plain = provenance._next_step
    patch.setattr(provenance, "_next_step", lambda reads, step, first: plain(reads, 99, first))


def carry_walked_once(patch):
    """What the body does with its carry is not followed round again."""
    patch.setattr(provenance.Dependency, "__eq__", lambda a, b: True)


def branch_without_question(patch):
    plain = provenance._Walk._cond

    def cond(self, equation, inputs):
        return plain(self, equation, [{}, *inputs[1:]])

    patch.setitem(provenance._OPENED, "cond", cond)


def one_branch(patch):
    def cond(self, equation, inputs):
        return self.through(equation.params["branches"][0].jaxpr, inputs[1:])

    patch.setitem(provenance._OPENED, "cond", cond)


def loop_without_question(patch):
    def loop(self, equation, inputs):
        p = equation.params
        first = p["cond_nconsts"]
        return self.through(p["body_jaxpr"].jaxpr, inputs[first:])

    patch.setitem(provenance._OPENED, "while", loop)


def unknown_kept(patch):
    """An operation without a rule counts as one that keeps its elements apart."""
    plain = axis_rules._places
    patch.setattr(
        axis_rules, "_places", lambda e: plain(e) or [tuple(range(len(atom.aval.shape))) for atom in e.invars]
    )


def rows_exchanged(patch):
    sizes_unchecked(patch)
    keeps_all("slice", "concatenate")(patch)


MUTANTS = {
    "rev": (keeps_all("rev"), "reversed"),
    "cumsum": (keeps_all("cumsum"), "cumulative"),
    "sort": (keeps_all("sort"), "sorted"),
    "transpose": (keeps_all("transpose"), "transposed_square"),
    "pad": (rule("pad", lambda params, shapes, out: [(0,), ()]), "shifted_by_padding"),
    "concatenate": (rows_exchanged, "halves_exchanged"),
    "reduce_sum": (
        rule("reduce_sum", lambda p, shapes, out: [tuple(min(a, len(out) - 1) for a in range(len(shapes[0])))]),
        "sum_of_square",
    ),
    "argmax": (rule("argmax", lambda p, shapes, out: [(0, None)]), "argmax_along"),
    "reduce_window": (keeps_all("reduce_window_sum"), "window_along"),
    "window_padding": (keeps_all("reduce_window_sum"), "window_stretched"),
    "fft": (keeps_all("fft"), "fourier_along"),
    "gather_operand": (rule("gather", looked_up_kept), "permuted"),
    "gather_at_draws": (rule("gather", looked_up_kept), "at_each_other"),
    "scatter_updates": (rule("scatter", updates_kept), "set_permuted"),
    "scatter_indices": (rule("scatter-add", lambda p, shapes, out: [(0,), (0, None), (None,)]), "set_at_draw"),
    "dot_contracted": (
        rule("dot_general", lambda p, shapes, out: [(0,) * len(shapes[0]), (0, *(None,) * len(shapes[1][1:]))]),
        "matrix_vector",
    ),
    "dot_left": (rule("dot_general", contracted_kept), "dense_square"),
    "conv_kernel": (rule("conv_general_dilated", kernel_kept), "kernel_drawn"),
    "conv_along": (keeps_all("conv_general_dilated"), "convolved"),
    "cholesky": (keeps_all("cholesky"), "factor"),
    "triangular": (keeps_all("triangular_solve"), "triangular_by_column"),
    "reshape": (reshape_by_size, "same_size_elsewhere"),
    "first_of_two": (first_of_two, "outer_sum"),
    "carry_of_the_same_element": (carry_of_the_same_element, "carried_along"),
    "carry_walked_once": (carry_walked_once, "mixed_in_the_carry"),
    "branch_without_question": (branch_without_question, "branched_by_one"),
    "one_branch": (one_branch, "branched_mixed"),
    "loop_without_question": (loop_without_question, "looped_while"),
    "unknown_kept": (unknown_kept, "called_back"),
    "sizes_unchecked": (sizes_unchecked, "part_at"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_caught(name, monkeypatch):
    apply, idiom = MUTANTS[name]
    assert faults(IDIOMS[idiom].function, IDIOMS[idiom].shape) == []
    apply(monkeypatch)
    assert faults(IDIOMS[idiom].function, IDIOMS[idiom].shape) != []
