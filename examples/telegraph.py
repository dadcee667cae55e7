"""Kinetic rates of a bursting gene from mRNA counts alone: a hidden promoter by the score function, against the exact law.

promoter g ~ Bernoulli(k_on / (k_on + k_off)), share on p | g ~ Beta(k_on + g, k_off + 1 − g), count n ~ Poisson(s p), all rates in units
of the mRNA's decay. Thousands of cells are simulated reaction by reaction; maximising `IWAE` over rates and guide is compared with
maximum likelihood under the closed form (Beta-Poisson), and q(g | n) with the posterior.

    python examples/telegraph.py --out results/telegraph.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train
from scipy.special import expit

from pplgrad import IWAE, VIMCO, Reparam

CHOICE = {"promoter": VIMCO(), "share": Reparam()}


@story(steps=600, backends=("pyro", "numpyro"))
def main(backend, steps, seed, out):
    script = model_script("telegraph")
    truth = tuple(script.OPTIONS[name] for name in ("k_on", "k_off", "rate"))
    on, counts = script.simulate(script.OPTIONS["cells"], *truth, np.random.default_rng(seed))
    data = counts[:, None].astype(float)
    program = getattr(script, f"{backend}_program")(script.OPTIONS, data, seed)
    params, _ = train(
        backend, program, data, steps, seed, estimators=CHOICE, learning_rate=0.03, particles=8, objective=IWAE()
    )
    learned, (best, _) = np.exp(params["log_rates"]), script.most_likely(counts)
    print("                      k_on  k_off     s  log likelihood, nats / cell")
    named = {"simulated with": truth, "exact law, maximal": best, "learned": learned}
    for name, rates in named.items():
        print("{:20} {:5.2f}  {:5.2f}  {:4.1f}  {:.4f}".format(name, *rates, script.log_law(rates, counts).mean()))

    n = np.arange(counts.max() + 1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    seen = [np.bincount(counts[on == state], minlength=len(n)) / len(counts) for state in (True, False)]
    axes[0].bar(n, seen[0], 1.0, color="0.55", label="simulated, promoter on")
    axes[0].bar(n, seen[1], 1.0, bottom=seen[0], color="0.8", label="simulated, off")
    axes[0].plot(n, np.exp(script.log_law(best, n)), color=COLOURS[0], label="exact law, maximum likelihood")
    axes[0].plot(n, np.exp(script.log_law(learned, n)), "--", color=COLOURS[1], label="exact law, learned rates")
    axes[0].set(xlabel="mRNA molecules in a cell", ylabel="share of cells")
    axes[0].legend(frameon=False, fontsize=8)
    enough = sum(seen) * len(counts) >= 10
    axes[1].plot(n[enough], (seen[0] / np.maximum(sum(seen), 1e-9))[enough], ".", color="0.55", label="simulated cells")
    axes[1].plot(n, script.promoter_on(best, n), color=COLOURS[0], label="posterior, maximum likelihood")
    axes[1].plot(n, expit(params["see"][: len(n)]), "--", color=COLOURS[1], label="learned q(on | count)")
    axes[1].set(xlabel="mRNA molecules in a cell", ylabel="probability that the promoter is on", ylim=(0, 1))
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
