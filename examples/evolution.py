"""Evolution strategies: the score function on a function that can only be evaluated, with antithetic pairs, beside CMA-ES.

x ~ N(μ, σ² I), ∇_μ E[f(x)] = E[½ (f(x) − f(x')) (x − μ)/σ²] with the mirror image x' = 2μ − x: `Mirrored()` at the site x. f is
a bowl of flat steps in six dimensions that NumPy evaluates, so that nothing can be differentiated. μ and log σ are trained by
Adam; every generation is centred and scaled by the one before it. Independent draws get as
many evaluations; CMA-ES (the package `cma`), which adapts a whole covariance, may take as many. --steps are generations.

    python examples/evolution.py --backend numpyro
"""

from dataclasses import dataclass, field

import cma
import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story
from tqdm import trange

from pplgrad import Expectation, Mirrored, ScoreFunction

POPULATION, RATE = 32, 0.06


@dataclass
class Recorder:
    """A function in NumPy that keeps what it was asked since the last look, and counts."""

    function: object
    points: list = field(default_factory=list)
    values: list = field(default_factory=list)

    def __call__(self, x):
        value = self.function(x)
        self.points.append(np.reshape(x, (-1, x.shape[-1])).copy())
        self.values.append(np.ravel(value))
        return value

    def taken(self):
        """Return the points and values since the last look."""
        found = np.concatenate(self.points), np.concatenate(self.values)
        self.points, self.values = [], []
        return found


def stepper(backend, program, estimator, steps, seed):
    """Return a function that takes one step of μ and log σ, given what is known of f; the learning rate falls to a hundredth."""
    (model, guide), decay = program, 0.01 ** (1 / steps)
    if backend == "pyro":
        import pyro
        import torch
        from pyro.infer import SVI

        from pplgrad.pyro import TraceGrad_ELBO

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        elbo = TraceGrad_ELBO(estimators={"x": estimator}, objective=Expectation())
        adam = pyro.optim.ClippedAdam({"lr": RATE, "lrd": decay, "clip_norm": 1e6})
        svi = SVI(model, guide, adam, elbo)
        return lambda known: svi.step(torch.as_tensor(known, dtype=torch.float32))
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO

    elbo = TraceGrad_ELBO(estimators={"x": estimator}, objective=Expectation())
    svi = SVI(model, guide, Adam(lambda i: RATE * decay**i), elbo)
    update, state = jax.jit(svi.update), None

    def step(known):
        nonlocal state
        known = known.astype(np.float32)
        if state is None:
            state = svi.init(jax.random.key(seed), known)
        state, loss = update(state, known)
        loss.block_until_ready()

    return step


def evolve(backend, script, function, estimator, population, steps, seed):
    """Return the mean of each generation's points, and how many evaluations had been made."""
    recorder = Recorder(script.FUNCTIONS[function])
    script.FUNCTIONS["recorded"] = recorder
    options = {**script.OPTIONS, "function": "recorded"}
    program = getattr(script, f"{backend}_program")(options, None, seed)
    step, known = stepper(backend, program, estimator, steps, seed), np.tile([0.0, 1.0], (population, 1))
    means, counts = [], []
    for generation in trange(steps, desc=type(estimator).__name__, mininterval=1.0):
        step(known)
        points, values = recorder.taken()
        if generation == 0:
            points, values = (
                points[-POPULATION:],
                values[-POPULATION:],
            )  # before them, the library looked at the program
        means.append(points.mean(0))
        counts.append(len(values))
        known = np.tile([values.mean(), values.std() + 1e-3], (population, 1))
    return np.array(means), np.cumsum(counts)


def by_cma(function, start, sigma, evaluations, seed):
    """Return the same of CMA-ES."""
    search = cma.CMAEvolutionStrategy(start, sigma, {"seed": seed + 1, "verbose": -9})
    means, counts = [], []
    while search.countevals < evaluations and not search.stop():
        points = search.ask()
        search.tell(points, [float(function(x)) for x in points])
        means.append(search.mean.copy())
        counts.append(search.countevals)
    return np.array(means), np.array(counts)


@story(steps=300)
def main(backend, steps, seed, out):
    script = model_script("blackbox")
    options = script.OPTIONS
    function, goal = script.FUNCTIONS[options["function"]], script.optimum(options["dimensions"])
    start = np.zeros(len(goal))
    name, half = options["function"], POPULATION // 2
    runs = {
        "mirrored pairs": evolve(backend, script, name, Mirrored(), half, steps, seed),
        "independent draws": evolve(backend, script, name, ScoreFunction(), POPULATION, steps, seed),
        "CMA-ES": by_cma(function, start, options["sigma"], POPULATION * steps, seed),
    }
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for colour, (which, (means, counts)) in zip(COLOURS, runs.items(), strict=False):
        away = np.linalg.norm(means - goal, axis=1)
        final = means[-20:].mean(0)
        close = np.flatnonzero(away < 0.3)
        print(
            f"{which}: {counts[-1]} evaluations, {counts[close[0]] if len(close) else 'never'} until within 0.3, "
            f"at the end f = {function(final):.4f}, distance {np.linalg.norm(final - goal):.3f}"
        )
        axis.plot(counts, away, color=colour, label=which)
    axis.axhline(0.05 * np.sqrt(len(goal)), color="k", lw=1, ls=":", label="corner of the flat bottom, f = 0")
    axis.set(
        xlabel="evaluations of f",
        ylabel="distance of the mean from the optimum",
        yscale="log",
        xscale="log",
    )
    axis.legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
