"""The best experiment, discrete and continuous: the design whose outcome is expected to tell most, by gradients alone.

    I(d) = E[log q(θ | y, d) − log p(θ)],   ∇ I = E[(log q(θ | y, d) − log p(θ)) ∇ log p(y | θ, d) + ∇ log q(θ | y, d)]

How many of 8 patients should get the new treatment? The design is a discrete site with a policy, and the posterior q is learned along
the way. When should photons of a decaying substance be counted? The time is a parameter, and counts cannot be
reparameterized: its gradient comes from the score of the count. Ends with both designs on the exact information gain.

    python examples/experiment_design.py --backend pyro --steps 400 --out results/experiment_design.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, LeaveOneOut, Reparam, ScoreFunction

SCORE = ScoreFunction(LeaveOneOut())
CHOICE = {"trial": {"n": SCORE, "y": Reparam()}, "decay": {"n": SCORE}}


def designed(problem, backend, steps, seed):
    """Return the designs, their exact information gain, and the parameters after training."""
    script = model_script("design")
    options = {**script.OPTIONS, "problem": problem}
    data, _ = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    settings = dict(estimators=CHOICE[problem], objective=Expectation(), particles=4, batch_size=256)
    params, _ = train(backend, program, data, steps, seed, learning_rate=0.05, **settings)
    return script.designs(options), script.information(options), params


@story(steps=400)
def main(backend, steps, seed, out):
    patients, gain, params = designed("trial", backend, steps, seed)
    policy = np.exp(0.3 * params["policy"])
    policy /= policy.sum()
    print(
        f"patients on the new treatment: {patients[policy.argmax()]} (best by the closed form: {patients[gain.argmax()]})"
    )

    times, information, params = designed("decay", backend, steps, seed)
    time = float(np.exp(params["log_time"]))
    reached, best = np.interp(time, times, information), information.max()
    print(f"time to count at: {time:.2f} s (best on the grid: {times[information.argmax()]:.2f} s)")
    print(f"information gain there: {reached:.4f} nats (best on the grid: {best:.4f})")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.bar(patients, policy, color=COLOURS[5], label="learned policy")
    left.set(xlabel="patients of 8 on the new treatment", ylabel="probability under the policy", ylim=(0, 1.2))
    other = left.twinx()
    other.plot(patients, gain, "o-", color=COLOURS[1], label="exact information gain")
    other.set(ylabel="information gain, nats", ylim=(1.2, 1.72))
    lines = [*left.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    left.legend(lines, [line.get_label() for line in lines], loc="upper left", fontsize=8)
    left.set_title("discrete: a trial")
    right.plot(times, information, color=COLOURS[1], label="exact information gain")
    right.axvline(0.5, color="grey", linestyle=":", label="first guess")
    right.axvline(time, color=COLOURS[0], label="learned time")
    right.set(xlabel="time of the count, s", ylabel="information gain, nats", title="continuous: photon counts")
    right.legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
