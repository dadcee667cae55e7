"""When mining became safer, by a hidden Markov model: its chain summed out or drawn, both compared with the exact evidence.

log p(x | rates, stay) = log Σ_z p(z | stay) Π_t p(x_t | rates[z_t]) is one cost of the program if the chain z is summed out (in `scan` in
NumPyro, in `pyro.markov` in Pyro). Two rates (continuous) and the probability to stay in a state (a discrete choice of six values) are
drawn in the guide. On a grid of the rates everything is exact: log p(x), the posterior of stay and the rate of each year. A guide that
draws the chain as well, from a learned Markov chain, must find the same.

    python examples/summed_hmm.py --out results/summed_hmm.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, gradient_variances, model_script, save, story, train
from scipy.special import softmax

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"which_*": ScoreFunction(LeaveOneOut()), "log_rates": Reparam()}
OPTIONS = {}
PARTICLES = 4
DRAWS = 200  # of each gradient


def mean_rates(script, options, data, params, rng, draws=500):
    """Return each year's mean rate: the chain's posterior given rates and stay, averaged over draws of them from the guide."""
    k = int(options["states"])
    log_rates = params["rates_loc"] + np.exp(params["rates_log_scale"]) * rng.normal(size=(draws, k))
    which = rng.choice(len(script.STAYS), size=draws, p=softmax(params["stay"].astype(float)))
    _, state = script.smoothed(options, data, log_rates, which)
    return (state * np.exp(log_rates)[:, None]).sum(-1).mean(0)


@story(steps=1000)
def main(backend, steps, seed, out):
    script = model_script("summed_hmm")
    options = {**script.OPTIONS, **OPTIONS}
    data = script.series()[: int(options["years"])]
    evidence, stays, rates = script.exact(options, data)
    print(f"log evidence, exact: {evidence:.3f} nats")
    fits, programs, times = {}, {}, {}
    for chain in ("summed", "sampled"):
        programs[chain] = getattr(script, f"{backend}_program")({**options, "chain": chain}, data, seed)

        def look(step, seconds, params, chain=chain):
            times[chain] = 1e3 * seconds / max(step - 1, 1)

        settings = dict(estimators=CHOICE, learning_rate=0.03, particles=PARTICLES, every=max(1, steps // 4), at=look)
        fits[chain] = train(backend, programs[chain], data, steps, seed, **settings)
        last = -fits[chain].losses[-max(1, steps // 5) :].mean()
        off = 0.5 * np.abs(softmax(fits[chain].params["stay"]) - stays).sum()
        print(
            f"{chain}: bound {last:.3f} nats, {evidence - last:.3f} below; q(stay) off by {off:.3f} in total variation; "
            f"{times[chain]:.2f} ms / step"
        )
    start = script.initial({**options, "chain": "sampled"}, data, seed)
    for place, params in (("the start", start), ("the end of the sampled chain's training", fits["sampled"].params)):
        found = {
            chain: gradient_variances(
                backend, program, data, params, estimators=CHOICE, particles=PARTICLES, draws=DRAWS, seed=seed
            )
            for chain, program in programs.items()
        }
        for name in ("rates_loc", "stay"):
            one, other = found["sampled"][name], found["summed"][name]
            print(f"gradient variance of {name} at {place}: sampled {one:.4g}, summed {other:.4g} nats²")
    years, rng = model_script("coal").FIRST + data[:, 0], np.random.default_rng(seed)
    lines = {"exact": rates, "summed": mean_rates(script, options, data, fits["summed"].params, rng)}
    print(f"rate of a year: off by at most {np.abs(lines['summed'] - rates).max():.3f} a year (chain summed)")
    picture(script, (years, data[:, 1], lines), (evidence, stays), fits, out)


def picture(script, seen, exact, fits, out):
    (years, counts, lines), (evidence, stays) = seen, exact
    figure, axes = plt.subplot_mosaic("ab;cc", figsize=(9, 6))
    axes["a"].axhline(evidence, color=COLOURS[6], lw=1, label="log evidence, exact")
    for (chain, fit), colour in zip(fits.items(), COLOURS, strict=False):
        width = max(1, len(fit.losses) // 50)
        smooth = np.convolve(-fit.losses, np.ones(width) / width, "valid")
        axes["a"].plot(np.arange(len(smooth)) + width, smooth, color=colour, label=f"bound, chain {chain}")
    axes["a"].set(xlabel="step", ylabel="nats", ylim=(evidence - 25, evidence + 3))
    axes["a"].legend(frameon=False, fontsize=8, loc="lower right")
    place = np.arange(len(stays))
    for i, (name, shown) in enumerate({"exact": None, **fits}.items()):
        q = stays if shown is None else softmax(shown.params["stay"])
        colour = COLOURS[6] if shown is None else COLOURS[i - 1]
        axes["b"].bar(place + 0.27 * (i - 1), q, 0.25, color=colour, label=name)
    axes["b"].set_xticks(place, script.STAYS)
    axes["b"].set(xlabel="probability to stay in a state", ylabel="posterior probability")
    axes["b"].legend(frameon=False, fontsize=8)
    axes["c"].bar(years, counts, color="0.8", width=1, label="disasters")
    axes["c"].plot(years, lines["exact"], color=COLOURS[6], lw=3, label="posterior mean rate, exact")
    axes["c"].plot(years, lines["summed"], color=COLOURS[0], lw=1.2, label="the same, chain summed")
    axes["c"].set(xlabel="year", ylabel="a year")
    axes["c"].legend(frameon=False, fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
