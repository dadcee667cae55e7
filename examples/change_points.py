"""When did coal mining become safer? Discrete change points by the score function, against enumeration.

change points uniform over the years, a Poisson rate for each segment with a Gamma(1, 1) prior. The posterior of one change point is a sum
over 111 years, that of two over 6,105 pairs, with the rates summed out; the guide learns q(c_1) q(c_2 | c_1), by ∇ E_q[f] =
E_q[f ∇ log q], and draws the rates given the change points. The data: explosions in British mines, 1851-1962 (Jarrett 1979).

    python examples/change_points.py --backend pyro --out results/change_points.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"change_*": ScoreFunction(LeaveOneOut()), "rate": Reparam()}


@story(steps=2000)
def main(backend, steps, seed, out):
    script = model_script("change_points")
    data = script.series()
    years = model_script("coal").FIRST + data[:, 0]
    figure, axes = plt.subplots(3, 1, figsize=(8, 6.4), sharex=True)
    axes[0].bar(years, data[:, 1], color="0.6")
    axes[0].set_ylabel("disasters / year")
    for changes, axis in zip((1, 2), axes[1:], strict=True):
        named = f"{changes} change point{'s' * (changes > 1)}"
        options = {**script.OPTIONS, "changes": changes}
        program = getattr(script, f"{backend}_program")(options, data, seed)
        params, losses = train(backend, program, data, steps, seed, estimators=CHOICE, learning_rate=0.1, particles=32)
        places, exact, evidence = script.exact_posterior(options, data)
        learned = script.guide_probabilities(params, places)
        bound = -losses[-len(losses) // 5 :].mean()
        print(f"{named}: log evidence {evidence:.2f} nats by enumeration, bound {bound:.2f} nats")
        for k in range(changes):
            by_year = [np.bincount(places[:, k], weights=p, minlength=len(years)) for p in (exact, learned)]
            off, likely = 0.5 * np.abs(by_year[0] - by_year[1]).sum(), int(years[np.argmax(by_year[1])])
            print(f"  change {k + 1}: most likely in {likely}; total variation from the exact posterior {off:.3f}")
            axis.bar(years, by_year[0], color="0.75", label="enumeration" if k == 0 else None)
            axis.step(years, by_year[1], where="mid", color=COLOURS[k], label=f"change {k + 1}, learned")
        axis.set_ylabel("posterior\nprobability")
        axis.legend(frameon=False, loc="upper right" if changes == 1 else "upper left")
        rates = script.mean_rates(options, data, places, learned)
        axes[0].step(years, rates, where="mid", color=COLOURS[changes + 1], label=f"mean rate, {named}", lw=1.8)
    axes[0].legend(frameon=False)
    axes[2].set_xlabel("year")
    save(figure, out)


if __name__ == "__main__":
    main()
