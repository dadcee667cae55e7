"""Programs for `LocalExpectation(elements=k)`, the same in both libraries, with its noise as a choice among finitely many."""

import numpy as np

from pplgrad.core.array_ops import bounded
from pplgrad.estimators import element_sampling
from pplgrad.testing.programs import CASES, Case, bernoulli, case, values

PARTS: dict[str, Case] = {name: CASES[name] for name in ("event", "batch_without_plate")}


@case({"z": ((1, 3), 2), "w": ((1,), 2)}, {"a": (2, 3), "b": (3,)}, subsamples={"data": (2, 1)}, into=PARTS)
def parents_in_a_minibatch(h):
    """Three elements in a subsampled plate, of which a child of the same plate reads the sum."""
    data = np.array([0.3, -0.6])

    def model():
        b = values("parents_in_a_minibatch", h)["b"]
        with h.plate("data", 2, subsample_size=1) as index:
            z = h.sample("z", bernoulli(h, b).to_event(1))
            w = h.sample("w", bernoulli(h, b[0] - z[..., 2]))
            h.sample("x", h.dist.Normal(w * z[..., 0] + z[..., 1] * z[..., 2], 1.0), obs=h.array(data)[index])

    def guide():
        p = values("parents_in_a_minibatch", h)
        with h.plate("data", 2, subsample_size=1) as index:
            z = h.sample("z", bernoulli(h, p["a"][index]).to_event(1))
            h.sample("w", bernoulli(h, p["b"][1] * z.sum(-1) - p["b"][2]))

    return model, guide


def finite_offset(draw, probabilities):
    """Return an offset of the same law as far as the elements drawn go: they change only where it passes an end."""
    xp, ends = draw.ops.xp, draw.ops.xp.cumulative_sum(probabilities, axis=-1)
    zero = xp.zeros_like(ends[..., :1])
    points = xp.sort(xp.concat([zero, ends - xp.floor(ends), zero + 1], axis=-1), axis=-1)
    lengths = points[..., 1:] - points[..., :-1]
    drawn = draw.noise.categorical(bounded(xp, xp.log(lengths)))
    middle = (points[..., 1:] + points[..., :-1]) / 2
    return xp.take_along_axis(middle, drawn[..., None], axis=-1)[..., 0]


def _with_probabilities(monkeypatch, change):
    plain = element_sampling.Part.of

    def of(draw, count):
        part = plain(draw, count)
        return element_sampling.Part(part.ops, part.chosen, change(part.probabilities, count / draw.index.shape[-1]))

    monkeypatch.setattr(element_sampling.Part, "of", of)


def without_weights(monkeypatch):
    """Break it: each element that was drawn counts once."""
    _with_probabilities(monkeypatch, lambda x, _: 0 * x + 1)


def as_if_drawn_alike(monkeypatch):
    """Break it: the elements are weighed as if all of them were drawn as often."""
    _with_probabilities(monkeypatch, lambda x, alike: 0 * x + alike)
