"""Small programs with finitely many outcomes, written once for both libraries.

`Host` is the little that the two libraries have in common; a `Case` names its parameters, its discrete latents
with the size of their support, and (for continuous latents, all Normal) the noise that is held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Host:
    """The primitives of one library under common names; `one_hot` makes a
    one-hot distribution from logits, `subset`, `ranking` and `permutation` those of their names, `array` a float64 array, `xp` is its namespace."""

    sample: Callable[..., Any]
    param: Callable[..., Any]
    plate: Callable[..., Any]
    mask: Callable[..., Any]
    scale: Callable[..., Any]
    factor: Callable[..., Any]
    dist: Any
    one_hot: Callable[[Any], Any]
    subset: Callable[[int, Any], Any]
    ranking: Callable[[Any], Any]
    permutation: Callable[[Any], Any]
    array: Callable[[Any], Any]
    xp: Any


@dataclass(frozen=True)
class Case:
    """A program: `build(host)` returns (model, guide), which take no arguments.

    `latents` maps each discrete site to (value shape, support size), where an infinite support is cut off; `noise` maps each Normal site to its standard
    noise; `subsamples` maps a subsampled plate to (size, subsample size); `one_hot` names latents whose values are one-hot
    vectors (their shape is that of the numbers). `impossible` says of each value of a site whether the guide never draws it,
    (*shape, support size). `vectors` has the values of a site whose values are vectors, (support size, length).
    """

    name: str
    params: dict[str, np.ndarray]
    latents: dict[str, tuple[tuple[int, ...], int]]
    build: Callable[[Host], tuple[Callable, Callable]]
    noise: dict[str, np.ndarray] = field(default_factory=dict)
    subsamples: dict[str, tuple[int, int]] = field(default_factory=dict)
    one_hot: tuple[str, ...] = ()
    impossible: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def can_be(self, site: str, index: np.ndarray) -> bool:
        """Return whether the guide draws a site's value, given as numbers of categories."""
        if site not in self.impossible:
            return True
        return not np.take_along_axis(self.impossible[site], index[..., None], -1).any()

    def value(self, site: str, index: np.ndarray) -> np.ndarray:
        """Return a site's value, given as numbers of categories."""
        if site in self.vectors:
            return self.vectors[site][index]
        return np.eye(self.latents[site][1])[index] if site in self.one_hot else index


CASES: dict[str, Case] = {}
ALL: dict[str, Case] = {}
"""The programs of `CASES`, which every estimator is proved on, and those of `reentering.py`."""
_MADE: dict[tuple[str, str], Any] = {}


def once(what: str, case: Case, make: Callable[[], Any]) -> Any:
    """Return what is the same whenever it is made of a program: made once, if the program is registered."""
    if ALL.get(case.name) is not case:
        return make()
    if (what, case.name) not in _MADE:
        _MADE[what, case.name] = make()
    return _MADE[what, case.name]


def case(latents, params, noise=None, subsamples=None, one_hot=(), vectors=None, into=CASES):  # type: ignore[no-untyped-def]
    """Register a program under its function's name; `params` maps names to shapes, filled with fixed numbers."""

    def register(build):  # type: ignore[no-untyped-def]
        name = build.__name__
        rng = np.random.default_rng(sum(map(ord, name)))
        values = {key: rng.normal(size=shape) for key, shape in params.items()}
        into[name] = ALL[name] = Case(
            name, values, latents, build, noise or {}, subsamples or {}, one_hot, {}, vectors or {}
        )
        return build

    return register


def values(name: str, host: Host) -> dict[str, Any]:
    """Return the parameters of a case as `param` sites of the host."""
    return {key: host.param(key, host.array(value)) for key, value in ALL[name].params.items()}


def bernoulli(h: Host, logits: Any) -> Any:
    """Return a Bernoulli with the given logits."""
    return h.dist.Bernoulli(logits=logits)


@case({"z": ((), 2)}, {"a": (), "b": (), "c": ()})
def single(h):
    def model():
        p = values("single", h)
        z = h.sample("z", bernoulli(h, p["b"]))
        h.sample("x", h.dist.Normal(p["c"] * z, 1.0), obs=h.array(0.7))

    def guide():
        h.sample("z", bernoulli(h, values("single", h)["a"]))

    return model, guide


@case({"z": ((), 2)}, {"a": (), "c": ()})
def shared_parameter(h):
    def model():
        p = values("shared_parameter", h)
        z = h.sample("z", bernoulli(h, p["a"] * p["c"]))
        h.sample("x", h.dist.Normal(p["a"] * z, 1.0), obs=h.array(0.3))

    def guide():
        p = values("shared_parameter", h)
        h.sample("z", bernoulli(h, p["a"] - 0.2 * p["c"]))

    return model, guide


@case({"z1": ((), 2), "z2": ((), 2), "z3": ((), 2)}, {"a": (5,), "b": (6,)})
def hierarchy(h):
    def model():
        b = values("hierarchy", h)["b"]
        z3 = h.sample("z3", bernoulli(h, b[0]))
        z2 = h.sample("z2", bernoulli(h, b[1] + b[2] * z3))
        z1 = h.sample("z1", bernoulli(h, b[3] + b[4] * z2))
        h.sample("x", h.dist.Normal(b[5] * z1 * (1 + z2), 1.0), obs=h.array(0.4))

    def guide():
        a = values("hierarchy", h)["a"]
        z1 = h.sample("z1", bernoulli(h, a[0]))
        z2 = h.sample("z2", bernoulli(h, a[1] + a[2] * z1))
        h.sample("z3", bernoulli(h, a[3] + a[4] * z2))

    return model, guide


@case({"z": ((), 2), "w": ((), 2)}, {"a": (6,), "b": (4,)}, noise={"x": np.array(0.37), "y": np.array(-1.1)})
def mixed(h):
    """A discrete site over a continuous one over a discrete one, and a second continuous one beside them."""

    def model():
        b = values("mixed", h)["b"]
        z = h.sample("z", bernoulli(h, b[0]))
        x = h.sample("x", h.dist.Normal(b[1] * z, 1.0))
        w = h.sample("w", bernoulli(h, b[2] * x))
        y = h.sample("y", h.dist.Normal(0.0, 1.0))
        h.sample("obs", h.dist.Normal(b[3] * w + x * y, 1.0), obs=h.array(0.9))

    def guide():
        a = values("mixed", h)["a"]
        z = h.sample("z", bernoulli(h, a[0]))
        x = h.sample("x", h.dist.Normal(a[1] + a[2] * z, h.xp.exp(0.3 * a[3])))
        h.sample("w", bernoulli(h, a[4] * x))
        h.sample("y", h.dist.Normal(a[5], 1.0))

    return model, guide


@case(
    {"g": ((), 2), "u": ((2,), 2), "v": ((2, 2), 2)},
    {"a": (), "au": (2,), "av": (2, 2), "b": (4,)},
)
def nested_plates(h):
    data = np.array([[0.3, -0.2], [1.1, 0.5]])

    def model():
        b = values("nested_plates", h)["b"]
        g = h.sample("g", bernoulli(h, b[0]))
        with h.plate("inner", 2, dim=-1):
            u = h.sample("u", bernoulli(h, b[1] * g))
            with h.plate("outer", 2, dim=-2):
                v = h.sample("v", bernoulli(h, b[2] + u))
                h.sample("x", h.dist.Normal(b[3] * v * (1 + u), 1.0), obs=h.array(data))

    def guide():
        p = values("nested_plates", h)
        g = h.sample("g", bernoulli(h, p["a"]))
        with h.plate("inner", 2, dim=-1):
            u = h.sample("u", bernoulli(h, p["au"] + 0.5 * g))
            with h.plate("outer", 2, dim=-2):
                h.sample("v", bernoulli(h, p["av"] * (1 + u)))

    return model, guide


@case({"z": ((2,), 2)}, {"a": (3,), "b": (2,)}, subsamples={"data": (3, 2)})
def minibatch(h):
    """Local latents alone in a subsampled plate, and a mask of observations."""
    data, seen = np.array([0.3, -0.6, 1.4]), h.xp.asarray(np.array([True, False, True]))

    def model():
        b = values("minibatch", h)["b"]
        with h.plate("data", 3, subsample_size=2) as index:
            z = h.sample("z", bernoulli(h, b[0]))
            with h.mask(seen[index]):
                h.sample("x", h.dist.Normal(b[1] * z, 1.0), obs=h.array(data)[index])
            h.sample("y", h.dist.Normal(b[0] - z, 1.0), obs=h.array(data)[index])

    def guide():
        with h.plate("data", 3, subsample_size=2) as index:
            h.sample("z", bernoulli(h, values("minibatch", h)["a"][index]))

    return model, guide


@case({"g": ((), 2), "z": ((2,), 2)}, {"g0": (), "a": (3,), "b": (3,)}, subsamples={"data": (3, 2)})
def subsampled(h):
    data = np.array([0.3, -0.6, 1.4])

    def model():
        b = values("subsampled", h)["b"]
        g = h.sample("g", bernoulli(h, b[0]))
        with h.plate("data", 3, subsample_size=2) as index:
            z = h.sample("z", bernoulli(h, b[1] + g))
            h.sample("x", h.dist.Normal(b[2] * z, 1.0), obs=h.array(data)[index])

    def guide():
        p = values("subsampled", h)
        h.sample("g", bernoulli(h, p["g0"]))
        with h.plate("data", 3, subsample_size=2) as index:
            h.sample("z", bernoulli(h, p["a"][index]))

    return model, guide


@case({"z": ((3,), 2)}, {"a": (3,), "b": (2,)})
def masked(h):
    latent = np.array([True, False, True])
    observed = np.array([True, True, False])

    def model():
        b = values("masked", h)["b"]
        with h.plate("data", 3):
            with h.mask(latent):
                z = h.sample("z", bernoulli(h, b[0]))
            with h.mask(observed):
                h.sample("x", h.dist.Normal(b[1] * z, 1.0), obs=h.array([0.3, -0.6, 1.4]))

    def guide():
        a = values("masked", h)["a"]
        with h.plate("data", 3), h.mask(latent):
            h.sample("z", bernoulli(h, a))

    return model, guide


@case({"z": ((), 2), "w": ((2,), 2)}, {"a": (3,), "b": (3,)})
def scaled(h):
    def model():
        b = values("scaled", h)["b"]
        with h.scale(2.5):
            z = h.sample("z", bernoulli(h, b[0]))
        with h.plate("data", 2), h.scale(0.5):
            w = h.sample("w", bernoulli(h, b[1] * z))
            h.sample("x", h.dist.Normal(b[2] * w * (1 + z), 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        a = values("scaled", h)["a"]
        with h.scale(2.5):
            z = h.sample("z", bernoulli(h, a[0]))
        with h.plate("data", 2), h.scale(0.5):
            h.sample("w", bernoulli(h, a[1:] + 0.4 * z))

    return model, guide


@case({"z0": ((), 2), "z1": ((), 2), "z2": ((), 2)}, {"a": (2,), "b": (3,)})
def chain(h):
    data = [0.2, -0.4, 0.9]

    def model():
        b = values("chain", h)["b"]
        z = 0.0
        for t in range(3):
            z = h.sample(f"z{t}", bernoulli(h, b[0] + b[1] * z))
            h.sample(f"x{t}", h.dist.Normal(b[2] * z, 1.0), obs=h.array(data[t]))

    def guide():
        a = values("chain", h)["a"]
        z = 0.0
        for t in range(3):
            z = h.sample(f"z{t}", bernoulli(h, a[0] + a[1] * z + 0.1 * t))

    return model, guide


@case({"z": ((3,), 2)}, {"a": (3,), "b": (3,)})
def event(h):
    """A vector event with a cost that does not separate."""

    def model():
        b = values("event", h)["b"]
        z = h.sample("z", bernoulli(h, b).to_event(1))
        h.factor("f", (z[..., 0] - 0.3) * (z[..., 1] + b[0]) * (z[..., 2] - 2.0 * b[1]))

    def guide():
        h.sample("z", bernoulli(h, values("event", h)["a"]).to_event(1))

    return model, guide


@case({"z": ((2, 2), 2)}, {"a": (2, 2), "b": (2,)})
def event_in_plate(h):
    def model():
        b = values("event_in_plate", h)["b"]
        with h.plate("data", 2):
            z = h.sample("z", bernoulli(h, b).to_event(1))
            h.sample("x", h.dist.Normal(z[..., 0] * z[..., 1] + z[..., 0], 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        with h.plate("data", 2):
            h.sample("z", bernoulli(h, values("event_in_plate", h)["a"]).to_event(1))

    return model, guide


@case({"z": ((2,), 2)}, {"a": (2,), "b": (2,)})
def batch_without_plate(h):
    """A batch dimension that no plate declares, under a cost that does not separate."""

    def model():
        b = values("batch_without_plate", h)["b"]
        z = h.sample("z", bernoulli(h, b))
        h.factor("f", (z[0] - 0.3) * (z[1] + b[0]))

    def guide():
        h.sample("z", bernoulli(h, values("batch_without_plate", h)["a"]))

    return model, guide


@case({"k": ((2,), 3)}, {"a": (2, 3), "b": (3,), "means": (3,)})
def categorical_index(h):
    def model():
        p = values("categorical_index", h)
        with h.plate("data", 2):
            k = h.sample("k", h.dist.Categorical(logits=p["b"]))
            h.sample("x", h.dist.Normal(p["means"][k], 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        with h.plate("data", 2):
            h.sample("k", h.dist.Categorical(logits=values("categorical_index", h)["a"]))

    return model, guide


@case({"k": ((1, 2), 5)}, {"a": (1, 2, 5), "b": (5,), "means": (5,)})
def five(h):
    """Categorical sites of five values with batch and event dimensions, under a cost that does not separate."""

    def model():
        p = values("five", h)
        with h.plate("data", 1):
            k = h.sample("k", h.dist.Categorical(logits=p["b"] + h.array(np.zeros((1, 2, 5)))).to_event(1))
            x = p["means"][k]
            h.sample("x", h.dist.Normal(x[..., 0] * x[..., 1] + x[..., 0], 1.0), obs=h.array([0.3]))

    def guide():
        with h.plate("data", 1):
            h.sample("k", h.dist.Categorical(logits=values("five", h)["a"]).to_event(1))

    return model, guide


@case({"z": ((), 2), "helper": ((), 2)}, {"a": (3,), "b": (2,)})
def auxiliary(h):
    """A guide site that the model does not have, marked auxiliary."""

    def model():
        b = values("auxiliary", h)["b"]
        z = h.sample("z", bernoulli(h, b[0]))
        h.sample("x", h.dist.Normal(b[1] * z, 1.0), obs=h.array(0.7))

    def guide():
        a = values("auxiliary", h)["a"]
        helper = h.sample("helper", bernoulli(h, a[0]), infer={"is_auxiliary": True})
        h.sample("z", bernoulli(h, a[1] + a[2] * helper))

    return model, guide


@case({"z": ((), 2)}, {"a": (), "b": (2,)})
def model_only_plate(h):
    def model():
        b = values("model_only_plate", h)["b"]
        z = h.sample("z", bernoulli(h, b[0]))
        with h.plate("data", 3):
            h.sample("x", h.dist.Normal(b[1] * z, 1.0), obs=h.array([0.3, -0.6, 1.4]))

    def guide():
        h.sample("z", bernoulli(h, values("model_only_plate", h)["a"]))

    return model, guide


@case({"z": ((2,), 2)}, {"a": (2,), "m": (2,), "b": (2,)}, noise={"x": np.array([0.4, -0.8])})
def both_kinds_in_one_plate(h):
    def model():
        b = values("both_kinds_in_one_plate", h)["b"]
        with h.plate("data", 2):
            z = h.sample("z", bernoulli(h, b[0]))
            x = h.sample("x", h.dist.Normal(b[1] * z, 1.0))
            h.sample("obs", h.dist.Normal(x * (1 + z), 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        p = values("both_kinds_in_one_plate", h)
        with h.plate("data", 2):
            z = h.sample("z", bernoulli(h, p["a"]))
            h.sample("x", h.dist.Normal(p["m"] + 0.7 * z, 1.0))

    return model, guide


@case({"z": ((), 2)}, {"m": (), "a": (2,), "b": (2,)}, noise={"x": np.array(0.6)})
def reparameterized_parent(h):
    """The score of z carries gradient to the parameter of its reparameterized parent."""

    def model():
        b = values("reparameterized_parent", h)["b"]
        x = h.sample("x", h.dist.Normal(0.0, 1.0))
        z = h.sample("z", bernoulli(h, b[0] * x))
        h.sample("obs", h.dist.Normal(b[1] * z, 1.0), obs=h.array(0.8))

    def guide():
        p = values("reparameterized_parent", h)
        x = h.sample("x", h.dist.Normal(p["m"], 1.0))
        h.sample("z", bernoulli(h, p["a"][0] + p["a"][1] * x))

    return model, guide


@case({"z": ((), 2), "w": ((), 2)}, {"a": (2,), "b": (2,)})
def independent(h):
    """Two sites that share no cost: neither is charged with the other's."""

    def model():
        b = values("independent", h)["b"]
        z = h.sample("z", bernoulli(h, b[0]))
        w = h.sample("w", bernoulli(h, b[1]))
        h.sample("xz", h.dist.Normal(z * 2.0, 1.0), obs=h.array(0.8))
        h.sample("xw", h.dist.Normal(w - 1.0, 1.0), obs=h.array(-0.5))

    def guide():
        a = values("independent", h)["a"]
        h.sample("z", bernoulli(h, a[0]))
        h.sample("w", bernoulli(h, a[1]))

    return model, guide


@case({"z": ((2,), 2)}, {"a": (2,), "b": (2,)})
def coupled_plate(h):
    """A plate of the guide whose elements meet in a cost outside of it."""

    def model():
        b = values("coupled_plate", h)["b"]
        with h.plate("data", 2):
            z = h.sample("z", bernoulli(h, b[0]))
        h.factor("f", (z[..., :1] - 0.3) * (z[..., 1:] + b[1]))

    def guide():
        with h.plate("data", 2):
            h.sample("z", bernoulli(h, values("coupled_plate", h)["a"]))

    return model, guide


@case({"n": ((), 3), "z": ((), 2)}, {"a": (3,), "b": (3,)})
def counts(h):
    """A binomial count over a binary site."""

    def model():
        b = values("counts", h)["b"]
        n = h.sample("n", h.dist.Binomial(2, logits=b[0]))
        z = h.sample("z", bernoulli(h, b[1] * n))
        h.sample("x", h.dist.Normal(b[2] * z * n, 1.0), obs=h.array(0.8))

    def guide():
        a = values("counts", h)["a"]
        n = h.sample("n", h.dist.Binomial(2, logits=a[0]))
        h.sample("z", bernoulli(h, a[1] + a[2] * n))

    return model, guide


@case({"k": ((2,), 3), "z": ((), 2)}, {"a": (2, 3), "c": (2,), "b": (3,), "means": (3,)}, one_hot=("k",))
def one_hot(h):
    """One-hot vectors in a plate over a binary site; the value is used as weights of a table."""

    def model():
        p = values("one_hot", h)
        z = h.sample("z", bernoulli(h, p["b"][0]))
        with h.plate("data", 2):
            k = h.sample("k", h.one_hot(p["b"] * z[..., None]))
            h.sample("x", h.dist.Normal((k * p["means"]).sum(-1), 1.0), obs=h.array([0.3, -0.6]))

    def guide():
        p = values("one_hot", h)
        z = h.sample("z", bernoulli(h, p["c"][0]))
        with h.plate("data", 2):
            h.sample("k", h.one_hot(p["a"] + p["c"][1] * z[..., None]))

    return model, guide
