"""User scripts of every shape, and what must be equal in both libraries for a comparison to mean anything."""

from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from pplgrad.lab import cli, cli_shared
from pplgrad.lab.data import Batches
from pplgrad.lab.results import read
from pplgrad.lab.script import load_script
from pplgrad.lab.tasks import Task, perform
from tests.lab.test_compare import SBN, refused, run

BACKENDS = ["pyro", "numpyro"]
# One Bernoulli latent a datum, its probability a constrained parameter, under two plates.
SCRIPT = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

OPTIONS = {}
DISCRETE = ("z",)

@dataclass
class Size:
    rows: int = 50

def load(options, seed):
    x = np.random.default_rng(seed).normal(size=(60, 4))
    return x[:Size().rows], x[Size().rows:]

def program(ppl, dist, start, constraint):
    from neighbour import PRIOR

    def plates(x):
        return ppl.plate("data", x.shape[0], dim=-2), ppl.plate("columns", 4, dim=-1)

    def model(x):
        rows, columns = plates(x)
        with rows, columns:
            z = ppl.sample("z", dist.Bernoulli(PRIOR))
            ppl.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)

    def guide(x):
        p = ppl.param("p", start, constraint=constraint)
        rows, columns = plates(x)
        with rows, columns:
            ppl.sample("z", dist.Bernoulli(p))

    return model, guide

def pyro_program(options, train, seed):
    import pyro, pyro.distributions as dist, torch
    pyro.param("unused", torch.zeros(2))
    model, guide = program(pyro, dist, torch.full((4,), 0.2), dist.constraints.unit_interval)
    def registering(x):
        pyro.param("unused", torch.zeros(2))
        guide(x)
    return model, registering

def numpyro_program(options, train, seed):
    import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    return program(numpyro, dist, jnp.full((4,), 0.2), dist.constraints.unit_interval)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("PRIOR = 0.4\n")
    return path


def configured(path, backend, steps=1, gradient_draws=64):
    script = load_script(path, (backend,))
    settings = dict(steps=steps, points=20, learning_rate=1e-9, gradient_draws=gradient_draws, bound_samples=0)
    common = dict(kind="training", script=str(path), digest=script.digest, options=script.options({}), backend=backend)
    return Task(**common, estimator="score", seed=0, particles=2, batch_size=10, objective="ELBO()", settings=settings)


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_nested_plates_dataclasses_and_neighbours(script, tmp_path):
    backends = [word for backend in BACKENDS for word in ("--backend", backend)]
    small = ["--steps", 2, "--seeds", 1, "--bound-samples", 2, "--quiet", "--out", tmp_path]
    result = run(script, *backends, "--estimator", "score", *small)
    assert result.exit_code == 0, result.output
    assert set(read(tmp_path)[0]["backend"]) == set(BACKENDS)


@pytest.mark.slow
def test_both_libraries_see_the_same_batches(script, tmp_path, monkeypatch):
    drawn: list[float] = []
    draw = Batches.next

    def recorded(self):
        batch = draw(self)
        drawn.append(batch.sum())
        return batch

    monkeypatch.setattr(Batches, "next", recorded)
    streams = []
    for backend in BACKENDS:
        drawn.clear()
        perform(configured(script, backend, steps=4), tmp_path)
        streams.append(list(drawn))
    assert streams[0] == streams[1] and len(streams[0]) == 5


@pytest.mark.slow
def test_gradient_variance_is_of_the_same_parameters_in_both_libraries(script, tmp_path):
    """In the constrained parameter it would be (1 / p (1 - p))^2 = 39 times larger."""
    found = [
        perform(configured(script, backend, gradient_draws=1500), tmp_path)["gradient_variance"] for backend in BACKENDS
    ]
    assert np.isclose(*found, rtol=0.25), found


# A guide without parameters; the model has one if it is `learned`.
PLAIN = """
import numpy as np

OPTIONS = {"learned": True}
DISCRETE = ("z",)

def load(options, seed):
    x = np.random.default_rng(seed).normal(size=(30, 1))
    return x, x

def program(ppl, dist, array, options):
    def model(x):
        b = ppl.param("b", array(0.3)) if options["learned"] else array(0.3)
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.4)))
            ppl.sample("x", dist.Normal(b * z, 1.0), obs=x[:, 0])

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Bernoulli(array(0.5)))

    return model, guide

def pyro_program(options, train, seed):
    import pyro, torch
    return program(pyro, pyro.distributions, torch.tensor, options)

def numpyro_program(options, train, seed):
    import jax.numpy as jnp, numpyro
    return program(numpyro, numpyro.distributions, jnp.asarray, options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guide_without_parameters_has_no_gradient_whose_variance_is_measured(tmp_path, backend):
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    result = perform(configured(path, backend), None)
    assert "error" not in result, result["error"]
    assert len(result["curve"]) == 2 and "gradient_variance" not in result


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_without_parameters_is_refused(tmp_path, backend):
    path = tmp_path / "plain.py"
    path.write_text(PLAIN)
    given = ["check", str(path), "--backend", backend, "--set", "learned=false"]
    result = CliRunner().invoke(cli.main, given, catch_exceptions=False)
    assert result.exit_code == 2 and "The program has no parameters, and so no gradient;" in result.stderr


def test_options_that_a_script_refuses(tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "binarize is 'threshold' or 'dynamic'; got 'treshold'" in refused(SBN, "--set", "binarize=treshold", *out)
    assert "layers is 1, 2 or 3; got 4" in refused(SBN, "--set", "layers=4", *out)
    assert "data is 'iris' or 'wine'" in refused(SBN.parent / "mixture.py", "--set", "data=irys", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_data_that_no_density_has_are_a_fault_of_the_script(script, tmp_path, backend):
    script.write_text(SCRIPT.replace("return x[:Size().rows]", "x[:] = np.inf\n    return x[:Size().rows]"))
    given = ["--backend", backend, "--estimator", "score", "--steps", 2, "--seeds", 1, "--quiet", "--out", tmp_path]
    assert "site 'x'" in refused(script, *given)


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_is_reported_and_is_the_exit_code(script, tmp_path, backend):
    """Parameters of such size have logits that are inf - inf, which is no fault of the script."""
    text = SCRIPT.replace("dist.Bernoulli(p)", "dist.Bernoulli(logits=(p - p / 2) * 2 + p**4 - p**4)").replace(
        ", constraint=constraint", ""
    )
    script.write_text(text)
    given = ["--backend", backend, "--estimator", "score", "--steps", 4, "--seeds", 1, "--quiet", "--out", tmp_path]
    result = run(script, *given, "--learning-rate", "1e12")
    assert result.exit_code == 1 and "failed: training" in result.output, result.output


def test_what_is_not_installed_is_named_before_anything_runs(tmp_path, monkeypatch):
    find = cli_shared.find_spec
    monkeypatch.setattr(cli_shared, "find_spec", lambda name: None if name == "pyarrow" else find(name))
    assert "compare needs pyarrow, not installed; pip install 'pplgrad[research]'" in refused(
        SBN, "--out", tmp_path / "a"
    )
    monkeypatch.undo()

    def absent(name):
        raise ModuleNotFoundError(name="jax")

    monkeypatch.setattr("pplgrad.lab.tasks.import_module", absent)
    message = refused(SBN, "--backend", "numpyro", "--out", tmp_path / "a")
    assert "needs jax, which is not installed; pip install 'pplgrad[numpyro]'" in message
    assert not (tmp_path / "a").exists()


def test_unknown_backend_is_refused():
    result = CliRunner().invoke(cli.main, ["compare", str(SBN), "--backend", "stan"])
    assert result.exit_code == 2 and "'stan' is not one of" in result.stderr


def test_a_failure_that_may_be_mended_is_tried_again_and_one_of_ours_is_kept(script, tmp_path):
    """A file that the script misses may be there next time; an estimator that does not fit a site never will."""
    task = replace(configured(script, "pyro"), estimator="Reparam()")
    kept = perform(task, tmp_path)
    assert "reparameteriz" in kept["error"] and (tmp_path / task.file).exists()
    script.write_text(SCRIPT.replace("def model(x):", "def model(x):\n        missing"))
    task = configured(script, "pyro")
    assert "NameError" in perform(task, tmp_path)["error"] and not (tmp_path / task.file).exists()
    script.write_text(SCRIPT)
    assert "curve" in perform(task, tmp_path)


def test_what_a_script_imports_from_its_folder_is_part_of_a_run(script):
    """A finished run is not repeated, and another program is no finished run."""
    before = load_script(script, ("pyro",)).digest
    (script.parent / "unrelated.py").write_text("PRIOR = 0.1\n")
    assert load_script(script, ("pyro",)).digest == before
    (script.parent / "neighbour.py").write_text("PRIOR = 0.5\n")
    assert load_script(script, ("pyro",)).digest != before
