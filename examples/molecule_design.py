"""Molecules for a reward that has no derivative: a recurrent guide writes SMILES strings, RDKit says how drug-like they are.

    ∇ E[QED(s)] = E[(QED(s) − b) Σ_t ∇ log q(c_t | c_<t)]

The reward is zero for strings that are no molecule, and the baseline b is the mean of the other particles. Two dozen known molecules,
imitated with a small weight, show what a string looks like. Ends with the reward and the fraction of valid strings before and after,
and with the best molecules found.

    python examples/molecule_design.py --backend pyro --steps 200 --out results/molecule_design.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, LeaveOneOut, ScoreFunction

DRAWN = 200  # strings, to judge a guide by


def trained(backend, steps, seed, reward=1.0):
    """Return the parameters after training, and the objective of each step."""
    script = model_script("molecules")
    options = {**script.OPTIONS, "reward": reward}
    data, _ = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    choice = {"c*": ScoreFunction(LeaveOneOut())}
    # The bonus keeps the guide from writing one molecule only; imitation alone needs none.
    objective = Expectation(entropy=0.005 * reward)
    settings = dict(estimators=choice, objective=objective, particles=4, batch_size=16)
    params, losses = train(backend, program, data, steps, seed, learning_rate=0.005, **settings)
    return params, -losses / 16


def judged(params, seed):
    """Return strings drawn from a guide, and the QED of each, NaN where it is no molecule."""
    script = model_script("molecules")
    drawn = script.strings(params, DRAWN, script.OPTIONS, seed)
    found = [script.drug_likeness(string) for string in drawn]
    return drawn, np.array([np.nan if qed is None else qed for qed in found])


def report(name, drawn, qed):
    """Print the figures of one guide."""
    valid = ~np.isnan(qed)
    print(
        f"{name}: mean reward {np.nan_to_num(qed).mean():.3f}, valid {valid.mean():.2f}, "
        f"different strings {len(set(drawn))} of {DRAWN}"
    )


@story(steps=500)
def main(backend, steps, seed, out):
    from rdkit import Chem
    from rdkit.Chem import Draw

    script = model_script("molecules")
    guides = {"before training": script.initial(script.OPTIONS, seed)}
    guides["imitation alone"], _ = trained(backend, steps, seed, reward=0.0)
    guides["with the reward"], objective = trained(backend, steps, seed)
    results = {name: judged(params, seed) for name, params in guides.items()}
    for name, (drawn, qed) in results.items():
        report(name, drawn, qed)
    drawn, qed = results["with the reward"]
    best = dict(sorted(zip(drawn, np.nan_to_num(qed), strict=True), key=lambda pair: -pair[1]))
    best = {string: value for string, value in best.items() if string not in script.EXAMPLES}
    top = list(best.items())[:6]
    print("best that are not examples: " + ", ".join(f"{string} ({value:.2f})" for string, value in top))

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), width_ratios=(3, 3, 5))
    width = max(1, steps // 50)
    means = objective[: steps // width * width].reshape(-1, width).mean(1)
    axes[0].plot(width * np.arange(len(means)), means, color=COLOURS[0])
    axes[0].set(xlabel="training step", ylabel="objective: QED, entropy and imitation")
    places = np.arange(len(results))
    values = [np.nan_to_num(qed).mean() for _, qed in results.values()]
    valid = [(~np.isnan(qed)).mean() for _, qed in results.values()]
    axes[1].bar(places - 0.2, values, 0.4, color=COLOURS[0], label="mean reward (QED)")
    axes[1].bar(places + 0.2, valid, 0.4, color=COLOURS[1], label="valid fraction")
    axes[1].set_xticks(places, [name.replace(" ", "\n", 1) for name in results])
    axes[1].set_ylim(0, 1.25)
    axes[1].legend(fontsize=8, loc="upper left")
    if top:
        molecules = [Chem.MolFromSmiles(string) for string, _ in top]
        legends = [f"QED {value:.2f}" for _, value in top]
        grid = Draw.MolsToGridImage(molecules, molsPerRow=3, subImgSize=(230, 190), legends=legends)
        axes[2].imshow(np.asarray(grid))
    axes[2].axis("off")
    axes[2].set_title("best molecules that are not examples")
    save(figure, out)


if __name__ == "__main__":
    main()
