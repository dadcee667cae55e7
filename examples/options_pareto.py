"""A policy with two levels and two objectives: credit at each level, and the front of worth against time.

    ∇ E[R] = E[Σ_k G_k ∇ log π(option_k | cell) + Σ_t G_t ∇ log π(move_t | option, cell)],   R = (1 − w) worth − w time

where G is the reward still to come after a draw of either level. A diver chooses a way of moving twice, and a move at every
step; each weight w of time has a policy of its own. Ends with what the policies reach, exactly, beside the treasures there are, and with
the variance of the gradient of each level when every draw is charged the whole episode instead.

    python examples/options_pareto.py --backend pyro --steps 300 --out results/options_pareto.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, LeaveOneOut, ScoreFunction

CREDIT = ScoreFunction(LeaveOneOut())
LEVELS = {"upper": "upper level (options)", "lower": "lower level (moves)"}


def variances(backend, script, options, seed, draws=100):
    """Return the total variance of the gradient of each level's table, at its start."""
    data, _ = script.load(options, seed)
    model, guide = getattr(script, f"{backend}_program")(options, data, seed)
    measure = {"pyro": _gradients_pyro, "numpyro": _gradients_numpyro}[backend]
    return {name: g.var(0).sum() for name, g in measure(model, guide, data.astype(np.float32), draws, seed).items()}


def _gradients_pyro(model, guide, data, draws, seed):
    import pyro
    import torch

    from pplgrad.pyro import TraceGrad_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    elbo = TraceGrad_ELBO(2, vectorize_particles=True, estimators={"*": CREDIT}, objective=Expectation())
    found = {name: [] for name in LEVELS}
    for _ in range(draws):
        elbo.loss_and_grads(model, guide, torch.as_tensor(data))
        for name, value in pyro.get_param_store().named_parameters():
            found[name].append(value.grad.numpy().copy())
            value.grad = None
    return {name: np.array(g) for name, g in found.items()}


def _gradients_numpyro(model, guide, data, draws, seed):
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO

    elbo = TraceGrad_ELBO(2, estimators={"*": CREDIT}, objective=Expectation())
    svi = SVI(model, guide, Adam(0.1), elbo)
    params = svi.get_params(svi.init(jax.random.key(seed), data))
    gradient = jax.jit(jax.grad(lambda params, key: elbo.loss(key, params, model, guide, data)))
    found = [gradient(params, key) for key in jax.random.split(jax.random.key(seed), draws)]
    return {name: np.array([g[name] for g in found]) for name in LEVELS}


@story(steps=300)
def main(backend, steps, seed, out):
    script = model_script("gridworld")
    options = script.OPTIONS
    data, _ = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    # The bonus is for the tables' rarely seen cells; at this size it costs a hundredth of the reward.
    objective = Expectation(entropy=0.01)
    settings = dict(estimators={"*": CREDIT}, objective=objective, particles=4, learning_rate=0.05)
    params, _ = train(backend, program, data, steps, seed, **settings)
    upper, lower = script.probabilities(params)
    reached = np.array([script.returns(u, l) for u, l in zip(upper, lower, strict=True)])
    weights = script.weights(options)
    regret = [script.best(w) - ((1 - w) * worth - w * time) for w, (worth, time) in zip(weights, reached, strict=True)]
    print(f"largest loss against the best policy, over all weights: {max(regret):.3f}")

    worth, time = script.front()
    near = [np.abs(reached - point).max(-1).min() < 0.25 for point in zip(worth, time, strict=True)]
    print(f"treasures of the front that some weight's policy finds: {sum(near)} of {len(near)}")
    credit = {c: variances(backend, script, {**options, "credit": c}, seed) for c in ("to go", "episode")}
    for name, title in LEVELS.items():
        to_go, episode = credit["to go"][name], credit["episode"][name]
        print(f"variance, {title}: {to_go:.3g} with its own credit, {episode:.3g} with the episode's")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), width_ratios=(3, 2))
    left.step(time, worth, where="post", color="grey", linewidth=1, zorder=1)
    left.scatter(time, worth, s=130, facecolors="none", edgecolors="black", label="treasures (exact front)")
    dots = left.scatter(
        reached[:, 1], reached[:, 0], c=weights, cmap="cividis", s=40, label="learned policies (exact value)"
    )
    figure.colorbar(dots, ax=left, label="weight w of time")
    left.set(xlabel="expected time, steps", ylabel="expected worth")
    left.legend(loc="lower right", fontsize=8)
    places = np.arange(len(LEVELS))
    for shift, (kind, by_level), colour in zip((-0.2, 0.2), credit.items(), COLOURS, strict=False):
        label = {"to go": "reward still to come", "episode": "reward of the episode"}[kind]
        right.bar(places + shift, [by_level[name] for name in LEVELS], 0.4, color=colour, label=label)
    right.set_xticks(places, [title.replace(" (", "\n(") for title in LEVELS.values()])
    right.set(ylabel="variance of the gradient", ylim=(0, None))
    right.legend(fontsize=8, loc="upper left")
    save(figure, out)


if __name__ == "__main__":
    main()
