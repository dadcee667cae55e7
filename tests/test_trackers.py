"""Records of `Watch` in experiment trackers, and early stopping; nothing here reaches a network."""

import math
import sys

import pytest

from pplgrad import ConfigurationError, DecayingAverage, EarlyStopping, ScoreFunction, Watch, to_mlflow, to_wandb
from tests import watching


def watched(backend, callback):
    """Train five steps under a watch of every second one, and return the records."""
    records = []

    def both(record):
        records.append(record)
        callback(record)

    watch = Watch(both, every=2, draws=2)
    if backend == "pyro":
        import pyro
        import pyro.distributions as dist
        import torch
        from pyro.infer import SVI
        from pyro.optim import Adam

        from pplgrad.pyro import TraceGrad_ELBO, config_estimators

        pyro.clear_param_store()
        model, guide = watching.program(pyro, dist, torch.tensor)
        guide = config_estimators(guide, {"z": ScoreFunction(DecayingAverage())}, watch=watch)
        svi = SVI(model, guide, Adam({"lr": 0.05}), TraceGrad_ELBO())
        for _ in range(5):
            svi.step(torch.tensor(watching.X))
        pyro.clear_param_store()
    else:
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        from numpyro.infer import SVI
        from numpyro.optim import Adam

        from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

        model, guide = watching.program(numpyro, dist, jnp.asarray)
        guide = config_estimators(guide, {"z": ScoreFunction(DecayingAverage())}, watch=watch)
        svi = SVI(model, guide, Adam(0.05), TraceGrad_ELBO())
        svi.run(jax.random.key(0), 5, jnp.asarray(watching.X), progress_bar=False)
        jax.effects_barrier()
    assert [record["step"] for record in records] == [0, 2, 4]
    return records


class Run:
    """A run of Weights & Biases, as far as it is asked."""

    def __init__(self):
        self.axes, self.rows = {}, []

    def define_metric(self, name, step_metric):
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, numbers):
        self.rows.append(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_weights_and_biases(backend):
    run = Run()
    records = watched(backend, to_wandb(run))
    assert run.rows == [{**watching.flat(record), "watch_step": record["step"]} for record in records]
    assert run.axes == dict.fromkeys(watching.flat(records[0]), "watch_step")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_weights_and_biases_itself(backend, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ConfigurationError, match="finds no active run"):
        to_wandb()
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    try:
        # What the training logs by itself, more often than the watch, drops nothing.
        for _ in range(50):
            run.log({"mine": 1.0})
        records = watched(backend, to_wandb())
        found = dict(run.summary)
    finally:
        run.finish()
    wanted = {**watching.flat(records[-1]), "watch_step": 4}
    assert {name: found[name] for name in wanted} == wanted
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_mlflow_itself(backend, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    with pytest.raises(ConfigurationError, match="finds no active run"):
        to_mlflow()
    with mlflow.start_run() as run:
        records = watched(backend, to_mlflow())
    client = mlflow.MlflowClient()
    for name in watching.flat(records[0]):
        history = [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, name)]
        # MLflow's database has no infinity.
        assert history == [(r["step"], min(watching.flat(r)[name], sys.float_info.max)) for r in records]
    # In a run that is not active, under a name that MLflow does not allow as it is.
    to_mlflow(run.info.run_id)({"step": 7, "loss": 1.0, "sites": {"layer[0]$z": {"entropy": 0.5}}})
    assert client.get_metric_history(run.info.run_id, "layer_0__z/entropy")[0].value == 0.5


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigurationError, match="to_wandb needs wandb, which is not installed"):
        to_wandb()
    with pytest.raises(ConfigurationError, match="to_mlflow needs mlflow, which is not installed"):
        to_mlflow()


BOUNDS = [-5.0, -4.0, -4.0, -3.95, -4.2, -3.0, -3.5, -3.2, -3.1, -2.0]


@pytest.mark.parametrize(
    ("patience", "minimum_change", "stops", "best"),
    [
        (1, 0.0, 2, -4.0),
        (2, 0.0, 7, -3.0),
        (3, 0.0, 8, -3.0),
        (4, 0.0, None, -2.0),
        (3, 0.1, 4, -4.0),
        (4, 0.1, None, -2.0),
    ],
)
@pytest.mark.parametrize("interrupted", [None, 1, 3, 6])
def test_early_stopping(patience, minimum_change, stops, best, interrupted):
    stopping = EarlyStopping(patience, minimum_change)
    said = []
    for number, bound in enumerate(BOUNDS):
        if number == interrupted:
            state = stopping.state_dict()
            stopping = EarlyStopping(patience, minimum_change)
            stopping.load_state_dict(state)
        said.append(stopping.update(bound))
        if said[-1]:
            break
    assert (len(said) - 1 if said[-1] else None) == stops
    assert stopping.best == best and BOUNDS[stopping.best_update] == best
    assert not stops or stopping.update(0.0), "it stays stopped"


@pytest.mark.slow
def test_early_stopping_takes_any_first_value_and_refuses_nan():
    stopping = EarlyStopping(2)
    assert [stopping.update(-math.inf) for _ in range(3)] == [False, False, True]
    with pytest.raises(ConfigurationError, match="not a number"):
        EarlyStopping(2).update(math.nan)
    with pytest.raises(ConfigurationError, match="not one that state_dict"):
        EarlyStopping(2).load_state_dict({})
    for options in ({"patience": 0}, {"patience": True}, {"patience": 1, "minimum_change": -1.0}):
        with pytest.raises(ConfigurationError, match="give a"):
            EarlyStopping(**options)
