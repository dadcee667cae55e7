"""Programs with a factor that NumPy computes, for both libraries, and functions that are called element by element."""

import numpy as np

from pplgrad.engine.black_box import BlackBox
from pplgrad.testing.programs import Case

PARAMS = {"a": np.array([0.3, -0.8]), "b": np.array([0.5, 0.2])}
LATENTS = {"z": ((2,), 2), "w": ((2,), 2)}


def reward(z, w, row):
    """Return the reward of one element, which no formula of either library knows."""
    return {(0, 0): 0.3, (0, 1): -1.1, (1, 0): 0.9, (1, 1): 2.0}[int(z), int(w)] * float(row.sum())


def rewards(z, w, row):
    """Return the rewards of all elements."""
    return np.array([reward(*each) for each in zip(z, w, row, strict=True)])


def together(z):
    """Return numbers of which each depends on all elements."""
    return z * (1.0 + z.sum()) ** 2


def less_their_mean(z):
    """Break the promise of a vectorized function."""
    return z - z.mean()


def plated(black_box, vectorized=False):
    """Return a program whose reward is computed element by element, with data as event."""

    def build(h):
        function = rewards if vectorized else reward
        rows = h.array([[1.0, 2.0], [-0.5, 0.2]])

        def model():
            with h.plate("p", 2):
                z = h.sample("z", h.dist.Bernoulli(h.array(0.4)))
                w = h.sample("w", h.dist.Bernoulli(h.array([0.4, 0.7])))
                h.factor("reward", black_box(function, z, w, rows, event_dim=(0, 0, 1), vectorized=vectorized))

        return model, _guide(h)

    return Case("plated", PARAMS, LATENTS, build)


def mixed(black_box):
    """Return a program whose reward reads the whole plate as an event, and is added up in the plate."""

    def build(h):
        def model():
            with h.plate("p", 2):
                z = h.sample("z", h.dist.Bernoulli(h.array(0.4)))
                h.sample("w", h.dist.Bernoulli(h.array(0.3)))
                h.factor("reward", black_box(together, z, event_dim=1, shape=(2,)))

        return model, _guide(h)

    return Case("mixed", PARAMS, LATENTS, build)


def _guide(h):
    def guide():
        a, b = (h.param(name, h.array(value)) for name, value in PARAMS.items())
        with h.plate("p", 2):
            z = h.sample("z", h.dist.Bernoulli(logits=a))
            h.sample("w", h.dist.Bernoulli(logits=b * z))

    return guide


def claim_events(patch):
    """The mutant: event axes are taken to follow the last axes of the result, element by element."""
    plain = BlackBox.places

    def places(self, shapes, out):
        last = range(len(out) - len(self.shape), len(out))
        found = zip(plain(self, shapes, out), self.event_dims, strict=True)
        return [(*kept[: len(kept) - event], *list(last)[:event]) for kept, event in found]

    patch.setattr(BlackBox, "places", places)


def complex_numbers(z):
    return 1j * z


def words(z):
    return "good"


WRONG = {
    "no function": (3, (2,), {}, "takes a function of NumPy arrays first; got int"),
    "negative": (reward, (2,), {"event_dim": -1}, "'reward' has event_dim=-1"),
    "too many": (reward, (2,), {"event_dim": 2}, r"'reward' has event_dim=2 at value 0, whose shape \(2,\)"),
    "one for each": (reward, (2,), {"event_dim": (0, 1)}, "'reward' has event_dim.*each of its 1 values"),
    "a shape": (reward, (2,), {"shape": 3}, "'reward' has shape=3"),
}
"""What is wrong from the start: the function, its value's shape, settings, and what is said."""
RETURNED = {
    "complex": (complex_numbers, {}, "'complex_numbers' returned of one element complex128"),
    "words": (words, {}, "'words' returned of one element <U4"),
    "nothing": (lambda z: None, {}, "'.*lambda.*' returned of one element NoneType"),
    "shape": (lambda z: np.ones(3), {}, r"an array of shape \(3,\) instead of \(\).*shape=\.\.\."),
    "rows": (lambda z: 1.0, {"vectorized": True}, r"returned of all rows an array of shape \(\) instead of \(2,\)"),
    "mixed": (less_their_mean, {"vectorized": True}, "'less_their_mean' was given with vectorized=True.*drop vectorized=True"),
}  # fmt: skip
"""What is found out when the function is called with two numbers."""
