"""What a study says in words: from numbers that were made up, with the intervals by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from pplgrad.lab.answer import answers
from pplgrad.lab.intervals import geometric_mean_and_factor, mean_and_half_width, with_half_width
from pplgrad.lab.results import tidy
from pplgrad.lab.summaries import at_budget, budgets, crowded, curves, gradient_table, training_table


def run(name, seed, ends, milliseconds=2.0, steps=(0, 50, 100), load=0.5, backend="numpyro"):
    task = {
        "kind": "training",
        "backend": backend,
        "estimator": name,
        "seed": seed,
        "settings": {"steps": steps[-1], "learning_rate": 0.1},
    }
    # The clock of a run holds its warm-up too.
    curve = [
        {"step": s, "seconds": 5.0 + s * milliseconds / 1e3, "train": v, "test": v}
        for s, v in zip(steps, ends, strict=True)
    ]
    return {"task": task, "curve": curve, "milliseconds": milliseconds, "load": load}


def study(*named, seeds=3):
    """Return the frame of a study: for each estimator its name, milliseconds, and what each seed reaches."""
    return tidy([run(name, s, (-10.0, -5.0, ends[s]), ms) for name, ms, ends in named for s in range(seeds)])


BEST, CLOSE, FAR = (
    ("best", 2.0, (-1.0, -1.5, -0.5)),
    ("close", 2.0, (-1.1, -1.4, -0.7)),
    ("far", 2.0, (-4.0, -4.4, -3.6)),
)


def test_the_three_lines():
    (answer,) = answers(study(CLOSE, BEST, FAR))
    assert (
        answer.best == "best" and answer.worse == ["far"] and answer.seeds == 3 and answer.budget == pytest.approx(0.2)
    )
    which, sure, price = answer.lines
    assert which.startswith("Which: `best`. After 200 ms of training steps in NumPyro")
    assert (
        "better than 1 of the 2 others; `close` cannot be told from it (95%, 3 seeds in pairs, 2 comparisons)" in sure
    )
    half = t.ppf(1 - 0.05 / 2 / 2, 2) * np.std([3.0, 2.9, 3.1], ddof=1) / 3**0.5
    assert f"`far` is {with_half_width(3.0, half)} nats per datum behind at that time" in price
    # By a line between the points; `best` passes -4 between 100 and 200 ms, and is seen there at the later point.
    assert answer.behind["far"] == (pytest.approx(3.0), pytest.approx(half))


def test_pairs_of_seeds_tell_what_means_alone_would_not():
    shared = np.array([0.0, 30.0, -30.0])
    (answer,) = answers(study(("a", 2.0, -1 + shared), ("b", 2.0, -2 + shared + [0.0, 0.01, -0.01])))
    assert answer.best == "a" and answer.worse == ["b"]


def test_equal_time_is_when_the_first_has_taken_its_steps():
    frame = study(("quick", 1.0, (-3.0,) * 3), ("slow", 4.0, (-1.0,) * 3))
    points = curves(frame)
    assert budgets(points) == {"numpyro": pytest.approx(0.1)}
    reached = at_budget(points).groupby("estimator")["test"].first()
    # The slow one has taken 25 of its steps: halfway from -10 to -5.
    assert reached["quick"] == -3.0 and reached["slow"] == pytest.approx(-7.5)
    assert answers(frame)[0].best == "quick"
    table = training_table(frame)
    assert list(table.index.get_level_values("estimator")) == ["quick", "slow"]
    assert points["time"].max() == pytest.approx(0.4)  # and not 5 s more


def test_an_estimator_that_failed_with_some_seeds_is_no_answer():
    rows = [run(name, s, (-10.0, -5.0, ends[s]), ms) for name, ms, ends in (BEST, CLOSE, FAR) for s in range(3)]
    lucky = run("lucky", 1, (-10.0, -5.0, 3.0))
    bad = [{"task": {**lucky["task"], "seed": s}, "error": "diverged"} for s in (0, 2)]
    (answer,) = answers(tidy([*rows, lucky, *bad]))
    assert answer.best == "best" and "of 3 estimators" in answer.lines[0]
    assert answer.lines[1].endswith(" Left out: `lucky` (failed with 2 of 3 seeds).")


def test_one_seed_or_one_estimator_is_said():
    assert "one seed says nothing of the spread" in answers(study(BEST, FAR, seeds=1))[0].lines[1]
    assert "no other estimator" in answers(study(BEST))[0].lines[1]


def test_a_price_that_is_not_known_is_not_given():
    (answer,) = answers(study(BEST, CLOSE))
    assert answer.lines[2] == "The price of a wrong choice: not known; no difference is larger than its interval."


def gradients(name, seed, mse, milliseconds):
    task = {"kind": "gradients", "backend": "pyro", "estimator": name, "seed": seed, "settings": {}}
    row = {
        "kind": "program",
        "name": "all",
        "gradient2": 1.0,
        "bias2": 0.0,
        "bias2_se": 0.1,
        "variance": mse,
        "mse": mse,
    }
    one = {"rows": [row], "milliseconds": milliseconds, "peak_bytes": 100}
    return {"task": task, "snapshots": {"0": one, "9": one}, "evaluations": 2}


def test_without_training_gradients_decide():
    frame = tidy(
        [
            gradients(n, s, m * (1 + 0.01 * s), ms)
            for n, m, ms in (("noisy", 8.0, 1.0), ("dear", 1.0, 2.0))
            for s in range(3)
        ]
    )
    (answer,) = answers(frame)
    assert answer.best == "dear" and answer.budget is None
    assert answer.lines[2] == "The price of a wrong choice: `noisy` needs 4 times as long for a gradient as good."
    table = gradient_table(frame)
    mean, factor = geometric_mean_and_factor([2.0, 2.02, 2.04])
    found = table.loc[(9, "pyro", "dear")]
    assert found["mse × ms", "mean"] == pytest.approx(mean) and found["efficiency", "half"] == pytest.approx(factor)


def test_a_busy_machine_is_noticed():
    assert crowded(study(BEST)) is None
    assert crowded(tidy([run("a", 0, (0.0, 0.0, 0.0), load=2.0)])) == 2.0


def test_intervals_hold_at_their_rate():
    rng = np.random.default_rng(0)
    held = [abs(m - 1.0) <= h for m, h in (mean_and_half_width(rng.normal(1.0, 2.0, 3)) for _ in range(4000))]
    assert abs(np.mean(held) - 0.95) < 0.015
    assert pd.isna(mean_and_half_width([1.0])[1])
