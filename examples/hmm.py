"""A hidden Markov model in `scan` finds the vowels: Fisher's identity in one run, and gradients beside expectation maximisation.

∇ log p(x) = E_{p(z | x)}[∇ log p(x, z)]: with the posterior's chain for a guide, the gradient that pplgrad estimates is the posterior-weighted
sum of forward-backward, and the bound is log p(x). A guide that is learned, by the score function in `scan` (a draw at t is charged with
costs from t on), gets to the same likelihood; so does EM. Letters of text that comes with scikit-learn.

    python examples/hmm.py --out results/hmm.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train
from scipy.special import softmax

from pplgrad import LeaveOneOut, ScoreFunction

CHOICE = {"z": ScoreFunction(LeaveOneOut())}


def gradients(program, params, data, draws, seed):
    """Return that many estimates of ∇ log p(x) at some parameters, each from one draw of all chains."""
    import jax
    import jax.numpy as jnp

    from pplgrad.numpyro import TraceGrad_ELBO

    elbo, data = TraceGrad_ELBO(estimators={"z": ScoreFunction()}), jnp.asarray(data)
    keys = jax.random.split(jax.random.key(seed), draws)
    estimate = jax.jit(jax.grad(lambda p, key: -elbo.loss(key, p, *program, data)))
    found = [estimate({n: jnp.asarray(v, jnp.float32) for n, v in params.items()}, key) for key in keys]
    return {name: np.stack([g[name] for g in found]) for name in params}


@story(steps=1000, backends=("numpyro",))
def main(steps, seed, out):
    script = model_script("hmm")
    data, test = script.load(script.OPTIONS, seed)
    letters = data.size
    programs = {
        guide: script.numpyro_program({**script.OPTIONS, "guide": guide}, data, seed) for guide in ("exact", "learned")
    }
    start = script.initial({**script.OPTIONS, "guide": "exact"}, data, seed)
    found, exact = gradients(programs["exact"], start, data, 200, seed), script.fisher_gradient(start, data)
    flat = [
        np.concatenate([g[name].reshape(*g[name].shape[: -exact[name].ndim], -1) for name in exact], -1)
        for g in (found, exact)
    ]
    mean, error = flat[0].mean(0), flat[0].std(0) / np.sqrt(len(flat[0]))
    print(
        f"gradient against forward-backward: largest |z| of {mean.size} coordinates {np.max(np.abs(mean - flat[1]) / error):.1f}"
    )

    em, curve = start, []
    for _ in range(200):
        curve.append(script.forward_backward(em, data)[0].sum() / letters)
        em = script.em_step(em, data)
    print(f"EM, {len(curve)} steps: {curve[-1]:.4f} nats / letter")
    fits = {}
    for guide, program in programs.items():
        fits[guide] = train("numpyro", program, data, steps, seed, estimators=CHOICE, learning_rate=0.03, particles=4)
        reached = [script.forward_backward(fits[guide].params, x)[0].sum() / x.size for x in (data, test)]
        print(f"gradients, {guide} guide: {reached[0]:.4f} nats / letter (test {reached[1]:.4f})")

    emit = softmax(fits["learned"].params["emit"], -1)
    odds = np.log2(emit[1] / emit[0])
    vowels = np.array([letter in "aeiou" for letter in script.LETTERS])
    odds *= np.sign(odds[vowels].mean() - odds[~vowels].mean())
    common = np.bincount(data.astype(int).ravel(), minlength=27) >= 20
    print(f"vowels in one state: {''.join(np.array(list(script.LETTERS))[common & (odds > 0)])!r}")
    picture(flat, error, curve, fits, letters, (odds, vowels, common, script.LETTERS), out)


def picture(flat, error, curve, fits, letters, emitted, out):
    figure, axes = plt.subplot_mosaic("ab;cc", figsize=(8, 6.4))
    axes["a"].errorbar(flat[1], flat[0].mean(0), 2 * error, fmt=".", color=COLOURS[0], lw=1)
    axes["a"].axline((0, 0), slope=1, color="0.6", lw=1)
    axes["a"].set(xlabel="∂ log p(x), forward-backward", ylabel="estimated in scan, ± 2 s.e.")
    axes["b"].plot(np.arange(1, len(curve) + 1), curve, color=COLOURS[6], label="EM: log p(x)")
    for (guide, fit), colour in zip(fits.items(), (COLOURS[0], COLOURS[1]), strict=True):
        label = "gradient: log p(x)" if guide == "exact" else "gradient, learned guide: bound"
        axes["b"].plot(np.arange(1, len(fit.losses) + 1), -fit.losses / letters, color=colour, label=label, lw=1)
    axes["b"].set(xlabel="step", ylabel="nats / letter", xscale="log", ylim=(curve[0] - 0.03, curve[-1] + 0.02))
    axes["b"].legend(frameon=False, fontsize=8)
    odds, vowels, common, names = emitted
    order = np.argsort(odds)[np.isin(np.argsort(odds), np.flatnonzero(common))]
    colours = [COLOURS[1] if vowels[i] else COLOURS[0] for i in order]
    axes["c"].bar(range(len(order)), odds[order], color=colours)
    axes["c"].axhline(0, color="0.3", lw=1)
    axes["c"].set_xticks(range(len(order)), ["␣" if names[i] == " " else names[i] for i in order])
    axes["c"].set(xlabel="letter (vowels in orange)", ylabel="state 1 against state 0, bits", ylim=(-8, 8))
    save(figure, out)


if __name__ == "__main__":
    main()
