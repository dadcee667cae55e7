"""Programs whose paths leave a plate and come back, or mix its elements inside, written once for both libraries.

In `reentered_*` a site outside of the plate stands between a draw in it and a cost in it; in `mixed_*` an element reads other
elements of a draw directly. A cost must be charged to the draw with all its elements: a reduction over the plate is biased.
What stands outside of a plate keeps a dimension of size 1 in its place, so that particles may be vectorized.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pplgrad.testing.programs import Case, Host, bernoulli, case, values

REENTERED: dict[str, Case] = {}
reentering: Any = partial(case, into=REENTERED)
DATA = [0.7, -1.0, 0.4]


def whole(h: Host, x: Any, axis: int = -1) -> Any:
    """Return the sum over an axis, which stays with size 1."""
    return h.xp.sum(1.0 * x, axis=axis, keepdims=True)


def observe(h: Host, loc: Any, data: Any = DATA[:2], name: str = "x") -> None:
    """Observe data around a location."""
    h.sample(name, h.dist.Normal(loc, 1.0), obs=h.array(data))


def through(name: str, decide: Callable) -> Callable:
    """Return the builder of a plate of two, a decision outside of it from `decide(h, z)`, and data in the plate again."""

    def build(h: Host) -> tuple[Callable, Callable]:
        def model() -> None:
            b = values(name, h)["b"]
            plate = h.plate("p", 2, dim=-1)
            with plate:
                h.sample("z", bernoulli(h, b[0]))
            g = h.sample("g", bernoulli(h, b[1:2]))
            with plate:
                observe(h, g * b[2:])

        def guide() -> None:
            a = values(name, h)["a"]
            with h.plate("p", 2, dim=-1):
                z = h.sample("z", bernoulli(h, a[:2]))
            h.sample("g", bernoulli(h, a[2] + a[3] * decide(h, z)))

        return model, guide

    build.__name__ = name
    return build


TWO_AND_ONE = {"z": ((2,), 2), "g": ((1,), 2)}
reentering(TWO_AND_ONE, {"a": (4,), "b": (4,)})(through("reentered_plate", whole))
reentering(TWO_AND_ONE, {"a": (4,), "b": (4,)})(
    through("reentered_by_lookup", lambda h, z: z[..., :1] * (1.0 + z[..., 1:]))
)


@reentering({"z": ((2,), 2), "g": ((1,), 2), "w": ((2,), 2), "h": ((1,), 2)}, {"a": (9,), "b": (7,)})
def reentered_twice(h):
    """The path leaves the plate, comes back, leaves it once more, and the data stand in it again."""

    def model():
        b = values("reentered_twice", h)["b"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            h.sample("z", bernoulli(h, b[0]))
        g = h.sample("g", bernoulli(h, b[1:2]))
        with plate:
            h.sample("w", bernoulli(h, b[2] + 0.5 * g))
        last = h.sample("h", bernoulli(h, b[3:4]))
        with plate:
            observe(h, last * b[5:])

    def guide():
        a = values("reentered_twice", h)["a"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            z = h.sample("z", bernoulli(h, a[:2]))
        g = h.sample("g", bernoulli(h, a[2] + a[3] * whole(h, z)))
        with plate:
            w = h.sample("w", bernoulli(h, a[4:6] * g))
        h.sample("h", bernoulli(h, a[6] + a[7] * whole(h, w)))

    return model, guide


@reentering({"z": ((2,), 2), "g": ((1,), 2), "w": ((2,), 2)}, {"a": (6,), "b": (6,)})
def reentered_beside(h):
    """One path leaves the plate, and another of the same draw stays inside it: both end in one cost."""

    def model():
        b = values("reentered_beside", h)["b"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            z = h.sample("z", bernoulli(h, b[0]))
        g = h.sample("g", bernoulli(h, b[1:2]))
        with plate:
            w = h.sample("w", bernoulli(h, b[2] * z))
            observe(h, g * b[3:5] + w)
            observe(h, z * b[5], name="y")

    def guide():
        a = values("reentered_beside", h)["a"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            z = h.sample("z", bernoulli(h, a[:2]))
        g = h.sample("g", bernoulli(h, a[2] + a[3] * whole(h, z)))
        with plate:
            h.sample("w", bernoulli(h, a[4:] * (z - g)))

    return model, guide


@reentering({"v": ((2, 2), 2), "u": ((2, 1), 2)}, {"a": (2, 2), "c": (3,), "b": (2,), "s": (2, 2)})
def reentered_nested(h):
    """A decision in the outer plate reads the inner one's elements: the path leaves the inner plate alone."""
    data = np.array([[0.3, -0.2], [1.1, 0.5]])

    def model():
        p = values("reentered_nested", h)
        inner = h.plate("inner", 2, dim=-1)
        with h.plate("outer", 2, dim=-2):
            with inner:
                v = h.sample("v", bernoulli(h, p["b"][0]))
            u = h.sample("u", bernoulli(h, p["b"][1] + h.array(np.zeros((2, 1)))))
            with inner:
                observe(h, u * p["s"], data)
                observe(h, v * p["s"], data, "y")

    def guide():
        p = values("reentered_nested", h)
        with h.plate("outer", 2, dim=-2):
            with h.plate("inner", 2, dim=-1):
                v = h.sample("v", bernoulli(h, p["a"]))
            h.sample("u", bernoulli(h, p["c"][0] + p["c"][1] * whole(h, v) + p["c"][2]))

    return model, guide


@reentering({"v": ((2, 2), 2), "u": ((2, 1), 2), "g": ((1, 1), 2)}, {"a": (2, 2), "c": (4,), "b": (3,), "s": (2, 2)})
def reentered_nested_twice(h):
    """From both plates to the outer one, from there out of all, and back into both."""
    data = np.array([[0.3, -0.2], [1.1, 0.5]])

    def model():
        p = values("reentered_nested_twice", h)
        inner, outer = h.plate("inner", 2, dim=-1), h.plate("outer", 2, dim=-2)
        with outer:
            with inner:
                h.sample("v", bernoulli(h, p["b"][0]))
            h.sample("u", bernoulli(h, p["b"][1] + h.array(np.zeros((2, 1)))))
        g = h.sample("g", bernoulli(h, p["b"][2:][:, None]))
        with outer, inner:
            observe(h, g * p["s"], data)

    def guide():
        p = values("reentered_nested_twice", h)
        with h.plate("outer", 2, dim=-2):
            with h.plate("inner", 2, dim=-1):
                v = h.sample("v", bernoulli(h, p["a"]))
            u = h.sample("u", bernoulli(h, p["c"][0] + p["c"][1] * whole(h, v)))
        h.sample("g", bernoulli(h, p["c"][2] + p["c"][3] * whole(h, u, -2)))

    return model, guide


@reentering({"r": ((2, 1), 2), "c": ((2,), 2)}, {"a": (2, 1), "e": (2,), "b": (2,), "s": (2, 2)})
def reentered_crossed(h):
    """Rows and columns cross: columns read the sum over the rows, and the data stand in both."""
    data = np.array([[0.3, -0.2], [1.1, 0.5]])

    def model():
        p = values("reentered_crossed", h)
        rows, columns = h.plate("rows", 2, dim=-2), h.plate("columns", 2, dim=-1)
        with rows:
            h.sample("r", bernoulli(h, p["b"][0] + h.array(np.zeros((2, 1)))))
        with columns:
            c = h.sample("c", bernoulli(h, p["b"][1]))
        with rows, columns:
            observe(h, c * p["s"], data)

    def guide():
        p = values("reentered_crossed", h)
        with h.plate("rows", 2, dim=-2):
            r = h.sample("r", bernoulli(h, p["a"]))
        with h.plate("columns", 2, dim=-1):
            h.sample("c", bernoulli(h, (p["e"] * whole(h, r, -2))[..., 0, :]))

    return model, guide


@reentering({"z": ((2,), 2), "g": ((1,), 2)}, {"a": (5,), "b": (5,)}, subsamples={"data": (3, 2)})
def reentered_subsampled(h):
    def model():
        b = values("reentered_subsampled", h)["b"]
        plate = h.plate("data", 3, subsample_size=2, dim=-1)
        with plate:
            h.sample("z", bernoulli(h, b[0]))
        g = h.sample("g", bernoulli(h, b[1:2]))
        with plate as index:
            observe(h, g * b[2:][index], h.array(DATA)[index])

    def guide():
        a = values("reentered_subsampled", h)["a"]
        with h.plate("data", 3, subsample_size=2, dim=-1) as index:
            z = h.sample("z", bernoulli(h, a[:3][index]))
        h.sample("g", bernoulli(h, a[3] + a[4] * whole(h, z)))

    return model, guide


@reentering({"z": ((3,), 2), "g": ((1,), 2)}, {"a": (5,), "b": (5,)})
def reentered_masked(h):
    latent, observed = np.array([True, False, True]), np.array([True, True, False])

    def model():
        b = values("reentered_masked", h)["b"]
        plate = h.plate("p", 3, dim=-1)
        with plate, h.mask(latent):
            h.sample("z", bernoulli(h, b[0]))
        g = h.sample("g", bernoulli(h, b[1:2]))
        with plate, h.mask(observed):
            observe(h, g * b[2:], DATA)

    def guide():
        a = values("reentered_masked", h)["a"]
        with h.plate("p", 3, dim=-1), h.mask(latent):
            z = h.sample("z", bernoulli(h, a[:3]))
        h.sample("g", bernoulli(h, a[3] + a[4] * whole(h, z)))

    return model, guide


@reentering({"z": ((2,), 2), "g": ((1,), 2)}, {"a": (4,), "b": (4,)})
def reentered_scaled(h):
    def model():
        b = values("reentered_scaled", h)["b"]
        plate = h.plate("p", 2, dim=-1)
        with h.scale(2.5):
            with plate:
                h.sample("z", bernoulli(h, b[0]))
            g = h.sample("g", bernoulli(h, b[1:2]))
        with plate, h.scale(0.5):
            observe(h, g * b[2:])

    def guide():
        a = values("reentered_scaled", h)["a"]
        with h.scale(2.5), h.plate("p", 2, dim=-1):
            z = h.sample("z", bernoulli(h, a[:2]))
        h.sample("g", bernoulli(h, a[2] + a[3] * whole(h, z)))

    return model, guide


@reentering({f"{n}{t}": ((2,) if n == "z" else (1,), 2) for t in range(2) for n in ("z", "g")}, {"a": (5,), "b": (4,)})
def reentered_steps(h):
    """Two steps, each with the plate in it; the decision of a step is carried on to the next."""

    def model():
        b, g = values("reentered_steps", h)["b"], 0.0
        for t in range(2):
            with h.plate(f"p{t}", 2, dim=-1):
                z = h.sample(f"z{t}", bernoulli(h, b[0] + b[1] * g))
                observe(h, z * b[2:] + g, name=f"x{t}")
            g = h.sample(f"g{t}", bernoulli(h, b[1:2]))

    def guide():
        a, g = values("reentered_steps", h)["a"], 0.0
        for t in range(2):
            with h.plate(f"p{t}", 2, dim=-1):
                z = h.sample(f"z{t}", bernoulli(h, a[:2] + a[2] * g))
            g = h.sample(f"g{t}", bernoulli(h, a[3] + a[4] * whole(h, z)))

    return model, guide


@reentering({"z": ((2,), 2), "w": ((2,), 2)}, {"a": (6,), "b": (5,)}, noise={"y": np.array([0.6])})
def reentered_continuous(h):
    """What stands between, outside of the plate, is a continuous site that is reparameterized."""

    def model():
        b = values("reentered_continuous", h)["b"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            h.sample("z", bernoulli(h, b[0]))
        y = h.sample("y", h.dist.Normal(h.array([0.0]), 1.0))
        with plate:
            w = h.sample("w", bernoulli(h, b[1:3] * y))
            observe(h, b[3:] * y * (1 + w))

    def guide():
        a = values("reentered_continuous", h)["a"]
        plate = h.plate("p", 2, dim=-1)
        with plate:
            z = h.sample("z", bernoulli(h, a[:2]))
        y = h.sample("y", h.dist.Normal(a[2] + a[3] * whole(h, z), 1.0))
        with plate:
            h.sample("w", bernoulli(h, a[4:] * y))

    return model, guide


@reentering({"k": ((2,), 3), "g": ((1,), 2)}, {"a": (2, 3), "c": (2,), "b": (3,), "means": (3,), "s": (2,)})
def reentered_categories(h):
    """Sites of three values in the plate; the decision reads a table at them."""

    def model():
        p = values("reentered_categories", h)
        plate = h.plate("p", 2, dim=-1)
        with plate:
            h.sample("k", h.dist.Categorical(logits=p["b"]))
        g = h.sample("g", bernoulli(h, p["b"][:1]))
        with plate:
            observe(h, g * p["s"])

    def guide():
        p = values("reentered_categories", h)
        with h.plate("p", 2, dim=-1):
            k = h.sample("k", h.dist.Categorical(logits=p["a"]))
        h.sample("g", bernoulli(h, p["c"][0] + p["c"][1] * whole(h, p["means"][k])))

    return model, guide


def mixing(name: str, mix: Callable, size: int = 3, event: int = 0) -> None:
    """Register a plate whose data read `mix(h, z)`: with `event`, z has so many joint numbers."""
    shape = (size, event) if event else (size,)

    def build(h: Host) -> tuple[Callable, Callable]:
        def site(logits: Any) -> Any:
            law = bernoulli(h, logits)
            return h.sample("z", law.to_event(1) if event else law)

        def model() -> None:
            p = values(name, h)
            with h.plate("p", size, dim=-1):
                z = site(p["b"][0] + h.array(np.zeros(shape)))
                observe(h, p["s"] * mix(h, 1.0 * z), DATA[:size])

        def guide() -> None:
            with h.plate("p", size, dim=-1):
                site(values(name, h)["a"])

        return model, guide

    build.__name__ = name
    reentering({"z": (shape, 2)}, {"a": shape, "b": (1,), "s": (size,)})(build)


MIXES: dict[str, Callable] = {
    "mixed_in_plate_sum": whole,
    "mixed_mean": lambda h, z: z - h.xp.mean(z, axis=-1, keepdims=True),
    "mixed_shift": lambda h, z: h.xp.roll(z, 1, axis=-1),
    "mixed_before": lambda h, z: h.xp.concat([0.0 * z[..., :1], z[..., :-1]], axis=-1),
    "mixed_reverse": lambda h, z: h.xp.flip(z, axis=-1),
    "mixed_matrix": lambda h, z: h.xp.matmul(z, h.array([[0.3, 1.0, -2.0], [0.5, 0.1, 0.8], [-1.0, 0.7, 0.2]])),
    "mixed_lookup": lambda h, z: z[..., [1, 2, 0]],
    "mixed_cumulative": lambda h, z: h.xp.cumulative_sum(z, axis=-1),
    "mixed_sorted": lambda h, z: h.xp.sort(z * h.array([1.0, 2.0, -1.5]), axis=-1),
    "mixed_shares": lambda h, z: h.xp.exp(z) / whole(h, h.xp.exp(z)),
    "mixed_reshaped": lambda h, z: h.xp.reshape(h.xp.matrix_transpose(h.xp.stack([z, 2.0 * z], axis=-2)), (-1,))[:3],
    "mixed_table": lambda h, z: h.xp.take_along_axis(2.0 * z, h.xp.astype(2.0 - z - z * z, h.xp.int64), axis=-1),
}
"""What each element of the data reads of all elements of the draw."""

for _name, _mix in MIXES.items():
    mixing(_name, _mix)
mixing("mixed_event", lambda h, z: z[..., 0] * h.xp.flip(z[..., 1], axis=-1), 2, event=2)
mixing("mixed_over_events", lambda h, z: h.xp.sum(z, axis=-2), 2, event=2)
mixing("mixed_blocks", lambda h, z: h.xp.reshape(h.xp.matrix_transpose(z), (2, 2))[..., 0] + z[..., 1], 2, event=2)


@reentering({"v": ((2, 2), 2)}, {"a": (2, 2), "b": (1,), "s": (2, 2)})
def mixed_transposed(h):
    """Two plates of the same size, and a cost that reads the draw with the plates exchanged."""

    def model():
        p = values("mixed_transposed", h)
        with h.plate("rows", 2, dim=-2), h.plate("columns", 2, dim=-1):
            v = h.sample("v", bernoulli(h, p["b"] + h.array(np.zeros((2, 2)))))
            observe(h, p["s"] * h.xp.matrix_transpose(v), np.array([[0.3, -0.2], [1.1, 0.5]]))

    def guide():
        with h.plate("rows", 2, dim=-2), h.plate("columns", 2, dim=-1):
            h.sample("v", bernoulli(h, values("mixed_transposed", h)["a"]))

    return model, guide


@reentering({"v": ((2, 2), 2)}, {"a": (2, 2), "b": (1,), "s": (2, 2)})
def mixed_in_one_of_two(h):
    """Mixed along the columns alone: the rows stay apart."""

    def model():
        p = values("mixed_in_one_of_two", h)
        with h.plate("rows", 2, dim=-2), h.plate("columns", 2, dim=-1):
            v = h.sample("v", bernoulli(h, p["b"] + h.array(np.zeros((2, 2)))))
            observe(h, p["s"] * whole(h, v), np.array([[0.3, -0.2], [1.1, 0.5]]))

    def guide():
        with h.plate("rows", 2, dim=-2), h.plate("columns", 2, dim=-1):
            h.sample("v", bernoulli(h, values("mixed_in_one_of_two", h)["a"]))

    return model, guide


@reentering({"z": ((2,), 2), "w": ((2,), 2)}, {"a": (4,), "b": (4,)})
def mixed_by_site(h):
    """A site of the guide reads the plate's elements in reverse; the data read that site alone."""

    def model():
        b = values("mixed_by_site", h)["b"]
        with h.plate("p", 2, dim=-1):
            h.sample("z", bernoulli(h, b[0]))
            w = h.sample("w", bernoulli(h, b[1]))
            observe(h, w * b[2:])

    def guide():
        a = values("mixed_by_site", h)["a"]
        with h.plate("p", 2, dim=-1):
            z = h.sample("z", bernoulli(h, a[:2]))
            h.sample("w", bernoulli(h, a[2:] * h.xp.flip(1.0 * z, axis=-1)))

    return model, guide


@reentering({"z": ((2,), 2)}, {"a": (2,), "b": (3,)})
def mixed_in_data(h):
    """The numbers that are observed read the draws: a target that another element moves."""

    def model():
        b = values("mixed_in_data", h)["b"]
        with h.plate("p", 2, dim=-1):
            z = h.sample("z", bernoulli(h, b[0]))
            h.sample("x", h.dist.Normal(b[1:], 1.0), obs=h.array(DATA[:2]) + h.xp.flip(1.0 * z, axis=-1))

    def guide():
        with h.plate("p", 2, dim=-1):
            h.sample("z", bernoulli(h, values("mixed_in_data", h)["a"]))

    return model, guide
