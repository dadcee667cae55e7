"""What must not change, and what must change in step, whatever the estimator."""

from contextlib import nullcontext

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RODEO,
    DisARM,
    DoubleCV,
    Enumerate,
    LeaveOneOut,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ScoreFunction,
    StickBreakingDisARM,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)

LINEAR = {
    "score": (ScoreFunction(), 1),
    "loo": (ScoreFunction(LeaveOneOut()), 2),
    "samples": (ScoreFunction(samples=3), 1),
    "local": (LocalExpectation(), 1),
    "enumerate": (Enumerate(), 1),
    "arm": (ARM(), 1),
    "disarm": (DisARM(), 1),
    "arms": (ARMS(3), 1),
    "stick": (StickBreakingDisARM(), 1),
    "tree": (TreeDisARM(), 1),
    "carms": (CARMS(3), 1),
    "rebar": (REBAR(learn=False), 1),
    "muprop": (MuProp(), 1),
    "double-cv": (DoubleCV(scale=1.0, learn=False), 1),
    "rodeo": (RODEO(learn=False), 1),
    "set": (UnorderedSet(2), 1),
    "sum": (SumAndSample(2), 1),
    "measure": (MeasureValued(), 1),
}
"""Estimators that are linear in the costs, with a number of particles."""

ORDERS = {
    "DisARM, ARM": (DisARM(), ARM(), 1),
    "ARMS, leave-one-out": (ARMS(4), ScoreFunction(samples=4), 1),
    "unordered set, samples": (UnorderedSet(4), ScoreFunction(samples=4), 1),
    "local expectation, score": (LocalExpectation(), ScoreFunction(), 1),
    "leave-one-out, score": (ScoreFunction(LeaveOneOut()), ScoreFunction(), 2),
    "CARMS, leave-one-out": (CARMS(4), ScoreFunction(samples=4), 1),
}
"""Pairs of which the first is known to vary no more, at equal evaluations but for local expectation."""


def toy(h):
    """Return the toy of Tucker et al. (2017) with several bits: a quadratic cost around 0.45."""

    def guide():
        h.sample("z", h.dist.Bernoulli(logits=h.param("a", h.array([0.2, -0.4, 0.9, 0.1]))).to_event(1))

    def model():
        z = h.sample("z", h.dist.Bernoulli(logits=h.array([0.0] * 4)).to_event(1))
        h.factor("f", 3.0 * ((z - 0.45) ** 2).sum(-1) + 2.0 * z[..., 0] * z[..., 1])

    return model, guide


def credited(h, plated):
    """Return independent bits whose costs are told apart by a plate, or taken as one joint cost without it."""

    def scope():
        return h.plate("data", 4) if plated else nullcontext()

    def guide():
        with scope():
            h.sample("z", h.dist.Bernoulli(logits=h.param("a", h.array([0.2, -0.4, 0.9, 0.1]))))

    def model():
        with scope():
            z = h.sample("z", h.dist.Bernoulli(logits=h.array([0.0] * 4)))
            h.sample("x", h.dist.Normal(2.0 * z, 1.0), obs=h.array([0.3, -0.6, 1.4, 0.2]))

    return model, guide
