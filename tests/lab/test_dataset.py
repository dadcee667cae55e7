"""A study's results as data, and the pictures made of them."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import pplgrad.lab
from pplgrad.errors import ConfigurationError
from pplgrad.lab import load_study, plot_bias, plot_training, plot_variance
from pplgrad.lab.plots import save
from pplgrad.lab.results import KEYS, write
from pplgrad.lab.script import ScriptError
from pplgrad.lab.study import Gradients, Study
from pplgrad.lab.summaries import gradient_table
from tests.lab.test_report import ABOUT, NAMES, results

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def made():
    rows = results()
    for row in rows:
        row["task"]["versions"] = {"jax": "0.10.2"}
        row["machine"] = {"system": "Linux", "cores": "2"}
    return rows


@pytest.fixture(scope="module")
def study(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write(made, Study("models/sbn.py", NAMES[:1], gradients=Gradients((0, 100))), ABOUT, folder)
    return load_study(folder)


def test_the_surface_is_what_is_named():
    assert set(pplgrad.lab.__all__) <= set(dir(pplgrad.lab))
    assert all(getattr(pplgrad.lab, name).__doc__ for name in pplgrad.lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pplgrad.lab.nothing  # noqa: B018


def test_the_frame_has_its_columns_and_types(study):
    assert list(study.frame.columns) == [*KEYS, "machine_cores", "machine_system", "version_jax"]
    types = study.frame.dtypes.astype(str)
    assert (
        types["value"] == types["learning_rate"] == "float64" and types["step"] == "Int64" and types["seed"] == "int64"
    )
    assert types["version_jax"] == types["machine_system"] == "category"
    assert set(study.frame["version_jax"]) == {"0.10.2"}
    assert study.about["command"] == ABOUT["command"]


def test_the_dataset_has_every_number_where_it_belongs(study, made):
    data = study.dataset
    for result in made:
        task = result["task"]
        where = {name: task[name] for name in ("backend", "estimator", "seed")}
        if "error" in result:
            continue
        if task["kind"] == "training":
            at = {**where, "learning_rate": 0.003}
            for point in result["curve"]:
                assert float(data["curve_test"].sel(step=point["step"], **at)) == point["test"]
                assert float(data["curve_time"].sel(step=point["step"], **where)) == pytest.approx(
                    point["step"] * 1.5e-3
                )
            assert float(data["end_gradient_variance"].sel(at)) == result["gradient_variance"]
        else:
            for step, one in result["snapshots"].items():
                at = {**where, "snapshot": int(step)}
                assert float(data["gradient_milliseconds"].sel(at)) == one["milliseconds"]
                for row in one["rows"]:
                    array = data["gradient_mse" if row["kind"] == "program" else f"{row['kind']}_mse"]
                    more = {} if row["kind"] == "program" else {row["kind"]: row["name"]}
                    assert float(array.sel(**at, **more)) == row["mse"]
    assert data["gradient_variance"].attrs == {"units": "(nats / datum)²", "long_name": "trace of the covariance"}
    assert all(array.attrs["long_name"] and array.attrs["units"] for array in data.values())
    # What failed has no numbers.
    assert NAMES[-1] not in data["estimator"].values


def test_the_pages_block_runs(made, tmp_path, monkeypatch):
    (block,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "studies.md").read_text(), re.DOTALL
    )
    (tmp_path / "results").mkdir()
    write(made, Study("models/sbn.py", NAMES[:1], gradients=Gradients((0, 100))), ABOUT, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block, scope)
    assert len(scope["axes"].lines) == len(NAMES) - 1


def test_the_datasets_path_will_do(study, tmp_path):
    with pytest.raises(ScriptError, match="There is no study.parquet"):
        load_study(tmp_path)
    with pytest.raises(ScriptError, match="There is no study.parquet"):
        load_study(tmp_path / "study.parquet")


@pytest.mark.parametrize("plot", [plot_training, plot_variance, plot_bias])
def test_a_plot_returns_its_axes_and_names_the_library(study, plot):
    import matplotlib.pyplot as plt

    with pytest.raises(ConfigurationError, match="give backend='pyro' or 'numpyro'"):
        plot(study)
    with pytest.raises(ConfigurationError, match="in 'torch'; it has: pyro, numpyro"):
        plot(study, backend="torch")
    _, mine = plt.subplots()
    assert plot(study, backend="pyro", ax=mine) is mine
    alone = plot(study.frame[study.frame["backend"] == "numpyro"])
    assert isinstance(alone, matplotlib.axes.Axes) and alone.get_xlabel()


@pytest.mark.slow
def test_the_pictures_of_a_page_are_not_among_the_users_figures(study, tmp_path):
    """Matplotlib shows a user all figures of pyplot, and warns, here with an error, where there are more than twenty."""
    import matplotlib.pyplot as plt

    theirs = [plt.figure() for _ in range(20)]
    frame = study.frame[study.frame["backend"] == "pyro"]
    assert save(frame, gradient_table(frame), tmp_path)
    assert plt.get_fignums() == [figure.number for figure in theirs]


def test_a_curve_is_the_mean_over_seeds(study):

    axes = plot_training(study, "pyro", across="step")
    line = next(line for line in axes.lines if line.get_label() == "DisARM()")
    wanted = study.dataset["curve_test"].sel(backend="pyro", estimator="DisARM()", learning_rate=0.003).mean("seed")
    np.testing.assert_allclose(line.get_ydata(), wanted)
    assert list(line.get_xdata()) == [0, 5, 10]
    with pytest.raises(ConfigurationError, match="give 'time' or 'step'"):
        plot_training(study, "pyro", across="hours")
    with pytest.raises(ConfigurationError, match="no gradients after 7 steps; it has them after: 0, 100"):
        plot_variance(study, 7, "pyro")
