"""What is proved of particle filters: all draws and all ancestors of a small hidden Markov model, by hand in NumPy, the same for both libraries.

Derivatives are taken with a complex step: those of sums of products of a few exponentials and logarithms, exact to rounding.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from pplgrad import FIVO
from pplgrad.engine import particle_filter
from pplgrad.engine.particle_filter import ParticleFilter

PARAMS = {"t": np.array([-0.4, 1.1]), "e": np.array([-0.5, 0.9]), "g": np.array([0.3, -0.6, 0.5])}
"""Of the model's transitions and emissions, and of the guide."""
X = np.array([0.6, -1.2, 0.8])
NOISE = (-1.1, 0.4)
"""A normal site's standard noise is one of these, each with probability 1/2: the identities hold for any noise."""

KINDS = {"discrete": (False, False), "global": (True, False), "mixed": (True, True)}
"""Whether a binary site w stands before the loop, and whether the states are normal and reparameterized."""

OBJECTIVES = {
    "score": FIVO(samples=2),
    "drop": FIVO(samples=2, resampling_gradient="drop"),
    "sometimes": FIVO(samples=2, threshold=0.92),
    "never": FIVO(samples=2, threshold=0),
    "systematic": FIVO(samples=2, resampling="systematic"),
    "stop-gradient": FIVO(samples=2, resampling_gradient="stop-gradient"),
    "stop-gradient systematic": FIVO(samples=2, resampling="systematic", resampling_gradient="stop-gradient"),
}


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def chance(logit, z):
    return sigmoid(logit) if z else 1 - sigmoid(logit)


def normal(x, mean, scale=1.0):
    return np.exp(-0.5 * ((x - mean) / scale) ** 2) / (scale * np.sqrt(2 * np.pi))


def of_model(p, normals, before, z, x, w):
    move = p["t"][0] + p["t"][1] * before + 0.7 * w
    if normals:
        return normal(z, move) * normal(x, p["e"][1] * z)
    return chance(move, z) * normal(x, p["e"][z])


def draws_of(p, normals, before, x, w):
    """Yield the values that the guide draws, each with its probability as a choice and its density."""
    move = p["g"][0] + p["g"][1] * before + p["g"][2] * x - 0.4 * w
    if normals:
        for number, noise in enumerate(NOISE):
            z = move + 0.8 * noise
            yield number, z, 0.5, normal(z, move, 0.8)
        return
    for z in (0, 1):
        yield z, z, chance(move, z), chance(move, z)


@dataclass(frozen=True)
class Outcome:
    """The numbers of the draws (steps, K) and uniform numbers (steps, ...) of a filter, how probable they are, and log Ẑ.

    With a site before the loop its draws are those of the first step.
    """

    draws: tuple
    uniforms: tuple
    probability: complex
    bound: complex


def outcomes(p, objective, steps=3, kind="discrete", particles=2):
    """Yield all outcomes of a filter."""
    even = np.full(particles, 1 / particles, complex)
    before, normals = KINDS[kind]
    for first in itertools.product((0, 1) if before else (0,), repeat=particles):
        start = Outcome((first,), (), 1.0 + 0j, 0j)
        weights = np.ones(particles, complex)
        if before:
            q = np.array([chance(p["g"][0], w) for w in first])
            start = Outcome((first,), (), q.prod(), 0j)
            weights = np.array([chance(p["t"][0], w) for w in first]) / q
        states = [(0, w) for w in first]
        yield from _continued(p, objective, X[:steps], start, states, even, weights, normals)


def _continued(p, objective, xs, past, states, carried, extra, normals):
    if not xs.size:
        yield past
        return
    for ancestors, uniform, chosen, weights in _choices(objective, carried, bool(past.uniforms)):
        from_ = [states[a] for a in ancestors]
        for draws in itertools.product(*(draws_of(p, normals, z, xs[0], w) for z, w in from_)):
            increments = [
                of_model(p, normals, before, z, xs[0], w) / q
                for (before, w), (_, z, _, q) in zip(from_, draws, strict=True)
            ]
            joint = weights * extra * np.array(increments)
            now = Outcome(
                (*past.draws, tuple(number for number, *_ in draws)),
                (*past.uniforms, uniform),
                past.probability * chosen * np.prod([chance for _, _, chance, _ in draws]),
                past.bound + np.log(joint.sum()),
            )
            after = [(z, w) for (_, w), (_, z, *_) in zip(from_, draws, strict=True)]
            yield from _continued(p, objective, xs[1:], now, after, joint / joint.sum(), 1.0, normals)


def _choices(objective, carried, resampled):
    """Yield ancestors, uniform numbers that lead to them, their probability, and the weights that the particles carry on."""
    count, real = len(carried), carried.real
    few = objective.threshold is None or 1 / (real**2).sum() < objective.threshold * count
    single = objective.resampling == "systematic"
    if not (resampled and few):
        yield range(count), np.full(1 if single else count, 0.5), 1.0, carried
        return
    even = np.full(count, 1 / count)
    ends = np.concatenate([[0], np.cumsum(carried)])
    if single:
        cuts = [
            0j,
            1 + 0j,
            *(count * end - k for end in ends[1:-1] for k in range(count) if 0 < count * end.real - k < 1),
        ]
        cuts.sort(key=lambda cut: cut.real)
        for left, right in itertools.pairwise(cuts):
            if (right - left).real < 1e-12:
                continue  # Of particles with the same path, whose weights are equal up to rounding.
            middle = (left + right).real / 2
            ancestors = [int((ends.real[1:] <= (middle + k) / count).sum()) for k in range(count)]
            yield ancestors, np.array([middle]), _followed(objective, right - left), even
        return
    for ancestors in itertools.product(range(count), repeat=count):
        uniform = np.array([(ends[a] + ends[a + 1]).real / 2 for a in ancestors])
        yield ancestors, uniform, _followed(objective, carried[list(ancestors)].prod()), even


def _followed(objective, chosen):
    """Return a probability, as a constant where its score is dropped."""
    return chosen if objective.resampling_gradient == "score" else chosen.real


def derivative(function):
    """Return the derivatives of a function of the parameters, by a complex step."""
    found = {}
    for name, value in PARAMS.items():
        found[name] = np.zeros(value.shape)
        for i in np.ndindex(value.shape):
            moved = {n: x.astype(complex) for n, x in PARAMS.items()}
            moved[name][i] += 1e-30j
            found[name][i] = function(moved).imag / 1e-30
    return found


def evidence(p, steps=3):
    """Return p(x) of the discrete program by a sum over all paths."""
    total = 0j
    for path in itertools.product((0, 1), repeat=steps):
        pairs = zip((0, *path), path, X[:steps], strict=False)
        total += np.prod([of_model(p, False, before, z, x, 0) for before, z, x in pairs])
    return total


def expected_bound(p, objective, steps=3, kind="discrete"):
    return sum(o.probability * o.bound for o in outcomes(p, objective, steps, kind))


def table(objective, steps=3, kind="discrete"):
    """Return the numbers of the draws (1 + steps, 2 outcomes), uniform numbers (steps, outcomes, ...), probabilities and bounds."""
    every = list(outcomes(PARAMS, objective, steps, kind))
    draws = np.array([o.draws for o in every]).transpose(1, 0, 2).reshape(1 + steps, -1)
    uniforms = np.array([o.uniforms for o in every]).transpose(1, 0, 2)
    return draws, uniforms, np.array([o.probability.real for o in every]), np.array([o.bound.real for o in every])


def weigh(patch, weights, change=lambda xp, x: x):
    """Let the filters, one for each outcome, count with their probability and without regard to each other."""

    def averaged(ops, x):
        return ops.xp.sum(ops.constant(weights, x) * change(ops.xp, x))

    patch.setattr(particle_filter, "averaged", averaged)
    patch.setattr(ParticleFilter, "alone", True)


def assert_exact(run, patch, short, steps=3, kind="discrete"):
    """`run(objective, kind, draws, uniforms)` returns loss and gradients, from one filter for each outcome."""
    objective = OBJECTIVES[short]
    draws, uniforms, weights, bounds = table(objective, steps, kind)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-12)
    if kind == "discrete":
        np.testing.assert_allclose(weights @ np.exp(bounds), evidence(PARAMS, steps), atol=1e-12)
    with patch.context() as inner:
        weigh(inner, weights)
        loss, found = run(objective, kind, draws, uniforms)
    np.testing.assert_allclose(-loss, expected_bound(PARAMS, objective, steps, kind).real, atol=1e-9, rtol=0)
    wanted = derivative(lambda p: expected_bound(p, objective, steps, kind))
    for name, exact in wanted.items():
        np.testing.assert_allclose(-np.asarray(found[name]), exact, atol=1e-9, rtol=0, err_msg=name)


def assert_evidence_exact(run, patch, short, steps=3, kind="discrete"):
    """The mean of Ẑ is the evidence, and that of its gradient the evidence's."""
    objective = OBJECTIVES[short]
    draws, uniforms, weights, bounds = table(objective, steps, kind)
    exact = evidence(PARAMS, steps).real
    with patch.context() as inner:
        weigh(inner, weights, lambda xp, x: xp.exp(x))
        loss, _ = run(objective, kind, draws, uniforms)
    np.testing.assert_allclose(-loss, exact, atol=1e-9, rtol=0)
    with patch.context() as inner:
        weigh(inner, weights * np.exp(bounds))
        _, found = run(objective, kind, draws, uniforms)
    for name, slope in derivative(lambda p: evidence(p, steps)).items():
        np.testing.assert_allclose(-np.asarray(found[name]), slope, atol=1e-9, rtol=0, err_msg=name)


MUTANTS = {}
"""Each breaks one thing; the value says which objective and check notice it."""


def mutant(short, check=assert_exact, kind="discrete"):
    def register(apply):
        MUTANTS[apply.__name__] = apply, short, check, kind
        return apply

    return register


def _changed(patch, change):
    plain = ParticleFilter.resampled
    patch.setattr(ParticleFilter, "resampled", lambda self, logs, *rest: change(self, logs, plain(self, logs, *rest)))


@mutant("score")
def weights_that_are_not_reset(patch):
    _changed(patch, lambda self, logs, found: found._replace(logs=logs))


@mutant("score")
def score_of_the_ancestors_lost(patch):
    _changed(patch, lambda self, logs, found: found._replace(score=0 * found.score))


@mutant("score")
def ancestors_that_nothing_follows(patch):
    _changed(patch, lambda self, logs, found: found._replace(ancestors=found.ancestors * 0 + self.ops.arange(2, logs)))


@mutant("score")
def score_of_the_draws_lost(patch):
    plain = ParticleFilter.surrogate
    patch.setattr(ParticleFilter, "surrogate", lambda self, steps: plain(self, steps._replace(draws=0 * steps.draws)))


@mutant("score")
def bound_with_the_particle_itself(patch):
    plain = ParticleFilter.weighed

    def weighed(self, logs, increments, scored):
        found = plain(self, logs, increments, scored)
        own = self.ops.stop_gradient(increments)
        return found._replace(without=found.without + own)

    patch.setattr(ParticleFilter, "weighed", weighed)


@mutant("score")
def baseline_that_has_seen_the_choice(patch):
    plain = ParticleFilter._centred
    patch.setattr(
        ParticleFilter,
        "_centred",
        lambda self, signal, past, known: plain(
            self, signal, past + 0.3 * signal[..., :2].sum(-1) if known else past, known
        ),
    )


@mutant("sometimes")
def resampled_at_every_step(patch):
    patch.setattr(ParticleFilter, "_due", lambda self, weights: weights[:, 0] >= 0)


@mutant("systematic")
def ancestors_as_if_independent(patch):
    patch.setattr(
        ParticleFilter,
        "_systematic_log_prob",
        lambda self, ends, flat: self.ops.xp.sum(
            self.ops.xp.log(self.ops.take(self.ops.xp.reshape(ends - _before(self, ends), (-1,)), flat)), axis=1
        ),
    )


def _before(self, ends):
    xp = self.ops.xp
    return xp.concat([xp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)


@mutant("stop-gradient", assert_evidence_exact)
def weights_without_their_gradient(patch):
    _changed(patch, lambda self, logs, found: found._replace(logs=self.ops.stop_gradient(found.logs)))
