"""What a user of the lab's results writes with type annotations; mypy and pyright read it from outside, and nothing runs it."""

from pathlib import Path
from typing import assert_type

from pplgrad.lab import StudyData, load_study, plot_bias, plot_training, plot_variance

data = load_study(Path("results"))
assert_type(data, StudyData)
for draw in (plot_training, plot_variance, plot_bias):
    draw(data)
