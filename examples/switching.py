"""Regimes of a drifting particle: discrete regimes by the score function and continuous states by reparameterization, in one `scan`.

s_t | s_{t−1} stays or moves, x_t = x_{t−1} + drift[s_t] + N(0, 0.3²), y_t = x_t + N(0, 0.5²). The drifts are learned with the guide
q(s_t | s_{t−1}, x_{t−1}, y) q(x_t | x_{t−1}, s_t, y). What it says of the regimes is compared with the truth and with the exact smoother
(forward-backward with the state on a grid).

    python examples/switching.py --out results/switching.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"s": ScoreFunction(LeaveOneOut()), "x": Reparam()}


def regimes_of(guide, params, y, seed, draws=200):
    """Return the guide's probabilities of the regimes, (series, T, 3), from draws."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer import Predictive

    params = {name: jnp.asarray(value) for name, value in params.items()}
    drawn = Predictive(guide, params=params, num_samples=draws)(jax.random.key(seed), jnp.asarray(y, jnp.float32))["s"]
    return np.eye(3)[np.asarray(drawn)].mean(0).swapaxes(0, 1)


@story(steps=1500, backends=("numpyro",))
def main(steps, seed, out):
    script = model_script("switching")
    regimes, y = script.simulate(script.OPTIONS, seed)
    program = script.numpyro_program(script.OPTIONS, y, seed)
    params, losses = train("numpyro", program, y, steps, seed, estimators=CHOICE, learning_rate=0.02, particles=4)
    evidence, exact = script.smoother(script.OPTIONS, script.DRIFTS, y)
    learned = regimes_of(program[1], params, y, seed)
    print("drifts: simulated with {}, learned {}".format(script.DRIFTS, np.round(params["drifts"], 2)))
    for name, found in (("exact smoother", exact), ("learned guide", learned)):
        print(f"regimes right, {name}: {np.mean(found.argmax(-1) == regimes):.1%} (chance 33%)")
    bound = -losses[-len(losses) // 5 :].mean() / y.size
    print(f"log evidence at the true drifts {evidence.sum() / y.size:.3f} nats / step, bound {bound:.3f}")

    figure, axes = plt.subplots(3, 1, figsize=(8, 6.2), sharex=True, height_ratios=(2, 1, 1))
    time = np.arange(y.shape[1])
    shown = int(np.argmax([len(np.unique(r)) + 0.1 * np.count_nonzero(np.diff(r)) for r in regimes]))
    axes[0].plot(time, y[shown], color="0.7", lw=1)
    for k, name in enumerate(("down", "still", "up")):
        here = regimes[shown] == k
        axes[0].plot(time[here], y[shown, here], ".", ms=8, color=COLOURS[k], label=f"true regime: {name}")
    axes[0].set_ylabel("position seen")
    axes[0].legend(frameon=False, fontsize=8)
    for axis, found, title in zip(axes[1:], (exact, learned), ("exact smoother", "learned guide"), strict=True):
        axis.stackplot(time, found[shown].T, colors=COLOURS[:3], step="mid", alpha=0.8)
        axis.set(ylabel="probability\nof regime", title=title, ylim=(0, 1))
    axes[2].set_xlabel("time, steps")
    save(figure, out)


if __name__ == "__main__":
    main()
