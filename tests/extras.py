"""Run by `make test-extras` in an environment that has one library alone: a step of it, and what is said about all that is missing."""

import importlib
import subprocess
import sys

import pplgrad

PROGRAMS = {
    "pyro": """
import pyro as ppl, pyro.distributions as dist, torch
from pyro.infer import SVI
from pyro.optim import Adam
from pplgrad import DisARM
from pplgrad.pyro import TraceGrad_ELBO, check_gradients

def model():
    z = ppl.sample("z", dist.Bernoulli(torch.tensor(0.3)))
    ppl.sample("x", dist.Normal(z, torch.tensor(1.0)), obs=torch.tensor(1.0))

def guide():
    ppl.sample("z", dist.Bernoulli(logits=ppl.param("a", torch.tensor(0.5))))

svi = SVI(model, guide, Adam({"lr": 0.1}), TraceGrad_ELBO(2, estimators={"z": DisARM()}))
assert all(svi.step() > 0 for _ in range(3))
""",
    "numpyro": """
import jax, numpyro as ppl, numpyro.distributions as dist
from numpyro.infer import SVI
from numpyro.optim import Adam
from pplgrad import DisARM
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients

def model():
    z = ppl.sample("z", dist.Bernoulli(0.3))
    ppl.sample("x", dist.Normal(z, 1.0), obs=1.0)

def guide():
    ppl.sample("z", dist.Bernoulli(logits=ppl.param("a", 0.5)))

svi = SVI(model, guide, Adam(0.1), TraceGrad_ELBO(2, estimators={"z": DisARM()}))
assert svi.run(jax.random.key(0), 3, progress_bar=False).losses.shape == (3,)
""",
}
CHECK = """
assert check_gradients(model, guide, estimators={"z": DisARM()}, draws=200, tolerance=0.9).status == "unbiased"
"""


def refusal(*command: str) -> str:
    """Return the last line of what a command that has to fail says."""
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False)
    assert done.returncode != 0, (command, done.stdout)
    return done.stderr.strip().splitlines()[-1]


def main(extra: str) -> None:
    """Check the environment of one extra."""
    other = {"pyro": "numpyro", "numpyro": "pyro"}[extra]
    exec(PROGRAMS[extra] + CHECK, {})
    try:
        importlib.import_module(f"pplgrad.{other}")
    except ModuleNotFoundError as error:
        print(error)
        assert f"pip install 'pplgrad[{other}]'" in str(error), error
    else:
        raise AssertionError(f"pplgrad.{other} could be imported")
    version = [sys.executable, "-m", "pplgrad.lab", "--version"]
    said = subprocess.run(version, capture_output=True, text=True, check=True).stdout
    assert said == f"pplgrad, version {pplgrad.__version__}\n", said
    print(line := refusal("-m", "pplgrad.lab", "estimators"))
    assert "pip install 'pplgrad[research]'" in line
    fit = "assess_fit(model, guide)"
    print(line := refusal("-c", PROGRAMS[extra] + f"from pplgrad.{extra} import assess_fit\n{fit}"))
    assert "pip install 'pplgrad[assess]'" in line
    print(line := refusal("-c", "from pplgrad.lab import load_study"))
    assert "pip install 'pplgrad[research]'" in line
    print(f"{extra} alone: {pplgrad.__file__}")


main(sys.argv[1])
