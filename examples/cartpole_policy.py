"""A policy gradient on CartPole: REINFORCE with reward-to-go, a learned value baseline, and an entropy bonus.

    ∇ E[R] = E[Σ_t (Σ_{u ≥ t} r_u − V(s_t)) ∇ log π(a_t | s_t)] + c ∇ H(π)

Actions are sites of the guide, rewards are factors, and which reward is charged to which action is what the library finds
in the program: those that come later. In Pyro the program steps Gymnasium's environment; in NumPyro the same equations
are part of a `scan`. Ends with training with and without the baseline, and with the trained policy in Gymnasium's environment.

    python examples/cartpole_policy.py --backend pyro --steps 40 --out results/cartpole_policy.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, ScoreFunction

LONGEST = 500  # steps of an episode when the policy is tried
BATCH = 4  # episodes of a training step


def trained(backend, steps, seed, baseline, longest=200):
    """Return the parameters, and the objective of each training step, in steps for which the pole stands."""
    script = model_script("cartpole")
    options = {**script.OPTIONS, "baseline": baseline, "steps": longest}
    data, _ = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    settings = dict(estimators={"a*": ScoreFunction()}, objective=Expectation(entropy=0.001))
    params, losses = train(backend, program, data, steps, seed, learning_rate=0.01, batch_size=BATCH, **settings)
    return params, -losses / BATCH / script.REWARD


def tried(params, seed, episodes=50):
    """Return the angle of the pole, in degrees, at each step in Gymnasium's environment: NaN where it has fallen."""
    script = model_script("cartpole")
    state = np.random.default_rng(seed + 1000).uniform(-0.05, 0.05, (episodes, 4))
    made = script.environment(state, LONGEST)
    angles, alive = np.full((LONGEST, episodes), np.nan), np.ones(episodes, bool)
    for t in range(LONGEST):
        angles[t] = np.where(alive, np.degrees(state[:, 2]), np.nan)
        state, _, fallen, _, _ = made.step(script.act(params, state))
        alive &= ~fallen
    return angles


@story(steps=150)
def main(backend, steps, seed, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for baseline, colour in zip((True, False), COLOURS, strict=False):
        params, stood = trained(backend, steps, seed, baseline)
        angles = tried(params, seed)
        lengths = (~np.isnan(angles)).sum(0)
        name, later = "value baseline" if baseline else "no baseline", stood[steps // 5 :]
        print(f"{name}: stands {lengths.mean():.0f} of {LONGEST} steps in Gymnasium when trained, mean of 50 episodes")
        print(
            f"{name}: mean return after the first fifth of training {later.mean():.0f} steps, lowest {later.min():.0f}"
        )
        left.plot(np.arange(steps), stood, color=colour, label=name)
        if baseline:
            right.plot(angles[:, :10], color=colour, linewidth=0.7)
    start = {name: np.asarray(x) for name, x in model_script("cartpole").initial({"hidden": 32}, seed).items()}
    right.plot(tried(start, seed)[:, :10], color=COLOURS[4], linewidth=0.9)
    for angle in (-12, 12):
        right.axhline(angle, color="grey", linestyle=":")
    left.set(xlabel=f"training step ({BATCH} episodes each)", ylabel="mean return and entropy bonus, steps")
    left.legend(fontsize=8)
    right.plot([], [], color=COLOURS[0], label="trained, with a value baseline")
    right.plot([], [], color=COLOURS[4], label="before training")
    right.set(xlabel="step of the episode (0.02 s)", ylabel="angle of the pole, degrees", ylim=(-15, 15))
    right.legend(fontsize=8, loc="lower right")
    save(figure, out)


if __name__ == "__main__":
    main()
