"""A program whose watched numbers are known: three Bernoulli draws in a plate, and one Normal; in both libraries."""

import numpy as np

from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import PplgradError
from pplgrad.estimators.registry import every_estimator

X = np.array([0.5, -1.0, 2.0])
LOGITS = np.array([0.4, -0.3, 1.1])
LOC = 0.7
LEVELS = np.array([-1.0, -2.0, -2.5])
"""What a baseline that knows the data subtracts."""


def _fits(estimator):
    try:
        estimator.check(SiteInfo("z", "Bernoulli", False, True, 2, categories=2, relaxable=True))
    except PplgradError:
        return False
    return True


FITTING = [estimator for estimator in every_estimator() if _fits(estimator)]


def program(ppl, dist, array):
    """Return model and guide for a library."""

    def model(x):
        ppl.sample("w", dist.Normal(array(0.0), 1.0))
        with ppl.plate("data", 3):
            z = ppl.sample("z", dist.Bernoulli(array(0.3)))
            ppl.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logits, loc = ppl.param("logits", array(LOGITS)), ppl.param("loc", array(LOC))
        ppl.sample("w", dist.Normal(loc, 1.0))
        with ppl.plate("data", 3):
            ppl.sample("z", dist.Bernoulli(logits=logits))

    return model, guide


def expected(baseline=0.0):
    """Return the numbers of site z under the score function with a baseline, by enumeration; those of w are known."""
    p1 = 1 / (1 + np.exp(-LOGITS))
    p = np.stack([1 - p1, p1])
    b = np.array([[0.0], [1.0]])
    cost = np.log([[0.7], [0.3]]) - 0.5 * (X - b) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(p)
    gradient = -(cost - baseline) * (b - p1)
    mean = (p * gradient).sum(0)
    variance = ((p * gradient**2).sum(0) - mean**2).sum()

    def spread(signal):
        middle = (p * signal).sum() / 3
        return (p * (signal - middle) ** 2).sum() / 3

    return {
        "gradient_variance": variance,
        "signal_to_noise": np.sqrt((mean**2).sum() / variance),
        "entropy": -(p * np.log(p)).sum() / 3,
        "explained_variance": 1 - spread(cost - baseline) / spread(cost),
    }


def check(record, baseline):
    """Compare a record of many draws with the enumerated numbers."""
    wanted, z, w = expected(baseline), record["sites"]["z"], record["sites"]["w"]
    assert set(z) == set(wanted)
    np.testing.assert_allclose(z["entropy"], wanted["entropy"], atol=1e-9)
    for name in ("gradient_variance", "signal_to_noise", "explained_variance"):
        np.testing.assert_allclose(z[name], wanted[name], rtol=0.06, atol=0.02, err_msg=name)
    np.testing.assert_allclose(w["gradient_variance"], 1.0, rtol=0.06)
    np.testing.assert_allclose(w["signal_to_noise"], LOC, rtol=0.06)
    np.testing.assert_allclose(w["entropy"], 0.5 * np.log(2 * np.pi * np.e), atol=1e-9)
    # The two sites share no parameter, and there is no other.
    np.testing.assert_allclose(record["gradient_variance"], z["gradient_variance"] + w["gradient_variance"])


def written(folder):
    """Return what TensorBoard reads from an event file: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def flat(record):
    """Return a record's numbers by TensorBoard's tags."""
    whole = {name: value for name, value in record.items() if name not in ("step", "sites")}
    return whole | {f"{site}/{name}": value for site, found in record["sites"].items() for name, value in found.items()}
