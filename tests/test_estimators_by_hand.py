"""The hand-written estimators of the benchmarks: their gradients have the mean and the variance of pplgrad's."""

import numpy as np
import pytest

from benchmarks import by_hand_estimators_torch, by_hand_torch, of_estimators, tables, works
from pplgrad.lab.specs import specification

SMALL = works.Work("sbn", 3, batch=2)
TIMES, PARTICLES = 300, 60
TEXTS = tuple(by_hand_estimators_torch.BY_HAND)


def work_of(particles):
    return works.Work("sbn", 3, batch=2, particles=particles)


def start_at(work):
    """Return parameters whose Bernoulli laws are far from even ones, where estimators differ."""
    rng = np.random.default_rng(3)
    found = works.start(work, works.arrays(work, 0), 0)
    return {name: x + 0.7 * rng.normal(size=x.shape) for name, x in found.items()}


def of_the_guide(gradients):
    """Return the means of the guide's gradients over repetitions, their errors, and the sum of their variances."""
    flat = np.concatenate([gradients[n].reshape(TIMES, -1) for n in sorted(gradients) if n.startswith("encode")], 1)
    return flat.mean(0), flat.std(0, ddof=1) / np.sqrt(TIMES), flat.var(0, ddof=1).sum()


@pytest.fixture(scope="module")
def in_numpyro():
    """Return a function from an estimator to its gradients in NumPyro, a row for each repetition."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    from pplgrad.numpyro import TraceGrad_ELBO

    def gradients(text):
        with jax.enable_x64(True):
            work = work_of(PARTICLES)
            model, guide, args = works.numpyro_program(work, works.arrays(work, 0), 0, double=True)
            params = {name: jnp.asarray(x) for name, x in start_at(work).items()}
            elbo = TraceGrad_ELBO(PARTICLES, estimators=specification(text).mapping(("z*",)))
            one = jax.grad(lambda p, key: elbo.loss(key, p, model, guide, *args))
            found = jax.jit(jax.vmap(one, (None, 0)))(params, jax.random.split(jax.random.key(1), TIMES))
            return {name: np.asarray(x) for name, x in found.items()}

    return gradients


def in_torch(text):
    import torch

    torch.manual_seed(0)
    work = work_of(PARTICLES)
    data = by_hand_torch.tensors(works.arrays(work, 0), torch.float64)
    params = {name: torch.tensor(x).requires_grad_() for name, x in start_at(work).items()}
    found = []
    for _ in range(TIMES):
        network = by_hand_estimators_torch.Network(work, params, data)
        surrogate = by_hand_estimators_torch.BY_HAND[text](network)[1]
        found.append([x.numpy() for x in torch.autograd.grad(surrogate, list(params.values()))])
    return {name: np.stack(rows) for name, rows in zip(params, zip(*found, strict=True), strict=True)}


def in_jax(text):
    import jax
    import jax.numpy as jnp

    from benchmarks import by_hand_estimators_jax
    from benchmarks import by_hand_jax as by_hand

    with jax.enable_x64(True):
        work = work_of(PARTICLES)
        data = by_hand.arrays(works.arrays(work, 0), jnp.float64)
        params = {name: jnp.asarray(x) for name, x in start_at(work).items()}

        def surrogate(params, key):
            return by_hand_estimators_jax.BY_HAND[text](by_hand_estimators_jax.Network(work, params, data), key)[1]

        keys = jax.random.split(jax.random.key(2), TIMES)
        found = jax.jit(jax.vmap(jax.grad(surrogate), (None, 0)))(params, keys)
        return {name: np.asarray(x) for name, x in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_same_law(text, in_numpyro):
    mean, error, variance = of_the_guide(in_numpyro(text))
    for by_hand in (in_torch, in_jax):
        other, other_error, other_variance = of_the_guide(by_hand(text))
        z = (mean - other) / np.sqrt(error**2 + other_error**2 + 1e-24)  # A pixel that is always black has no gradient.
        assert np.abs(z).max() < 4.5, (by_hand.__name__, z)
        assert 0.8 < variance / other_variance < 1.25, by_hand.__name__


@pytest.mark.slow
@pytest.mark.parametrize("library", ["PyTorch", "JAX"])
def test_takes_a_step(library):
    data = works.arrays(SMALL, 0)
    for text in TEXTS:
        work = work_of(2) if "LeaveOneOut" in text else SMALL
        of_estimators.contestant(f"{library} by hand, {text}").build(work, data, 0).step()


@pytest.mark.slow
def test_names_say_what_is_measured():
    for text in ("default", "DisARM()", "ScoreFunction(baseline=LeaveOneOut())"):
        for what, form in of_estimators.ROLES.items():
            assert of_estimators.role(form.format(text)) == (text, what)
    assert of_estimators.role("Pyro TraceGrad_ELBO compiled") is None
    assert of_estimators.role("JAX by hand gradient only") is None


def test_the_table_of_estimators():
    """A line has the ratios by turn; what is above its aim stands in bold."""
    from benchmarks import suite, turns

    work, text = works.Work("sbn", 200), "DisARM()"
    times = {"Pyro": 6.0, "Pyro's limit": 2.0, "NumPyro": 1.0, "JAX by hand": 1.0, "Pyro compiled": 1.4}
    times["Pyro compiled, joint optimizer"] = 1.2
    found = [
        turns.Found(of_estimators.ROLES[what].format(text), turns=dict.fromkeys(range(3), ms), note="evaluations: 2")
        for what, ms in times.items()
    ]
    page = tables.markdown(suite.tidy(work, found, 0, "a cell"))
    line = next(line for line in page.splitlines() if line.startswith("| `DisARM()`"))
    ratios = "**3 (3 to 3)** |  | 1.4 (1.4 to 1.4) | 1.2 (1.2 to 1.2) | 1 (1 to 1) | "
    assert line == f"| `DisARM()` | 2 | {ratios} | 6 |  | 1.4 | 1.2 | 1 |"
