"""Particle filters through `scan`: exact over all draws and all ancestors of a hidden Markov model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import substitute
from numpyro.infer import SVI

from pplgrad import (
    FIVO,
    VIMCO,
    ConfigurationError,
    DisARM,
    Enumerate,
    EstimatorError,
    ImpossibleValueError,
    LeaveOneOut,
    ProgramError,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, _filter, check_gradients, config_estimators
from pplgrad.testing.in_numpyro import KEY, array
from tests import filtering as shared


def chain(kind="discrete", forced=None, particles=2):
    """Return model and guide, whose draws are those with the numbers `forced`, (1 + steps, particles), if they are given."""
    before, normals = shared.KINDS[kind]

    def parameter(name):
        return numpyro.param(name, array(shared.PARAMS[name]))

    def model(xs):
        t, e, _ = parameter("t"), parameter("e"), parameter("g")
        w = numpyro.sample("w", dist.Bernoulli(logits=t[0])) if before else 0.0

        def step(carried, x):
            move = t[0] + t[1] * carried + 0.7 * w
            z = numpyro.sample("z", dist.Normal(move, 1.0) if normals else dist.Bernoulli(logits=move))
            mean = e[1] * z if normals else jnp.where(z == 1, e[1], e[0])
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
            return z.astype(float), None

        scan(step, 0.0, xs)

    def guide(xs):
        g = parameter("g")
        w = 0.0
        if before:
            with substitute(data=first(forced)):
                w = numpyro.sample("w", dist.Bernoulli(logits=g[0]))

        def step(carried, row):
            x, number = row
            move = g[0] + g[1] * carried + g[2] * x - 0.4 * w
            data = {}
            if forced is not None:
                chosen = jnp.asarray(forced)[number + 1, which(known[1][number])]
                data = {"z": move + 0.8 * array(shared.NOISE)[chosen] if normals else chosen}
            with substitute(data=data):
                z = numpyro.sample("z", dist.Normal(move, 0.8) if normals else dist.Bernoulli(logits=move))
            return z.astype(float), None

        scan(step, 0.0, (xs, jnp.arange(len(xs))))

    def first(forced):
        return {} if forced is None else {"w": jnp.asarray(forced)[0, which(known[0])]}

    known = None if forced is None else _known_keys(len(forced) - 1, particles)
    return model, guide


def which(known):
    """Return the number of the particle that runs, given what each draws from its key."""
    return jnp.argmax(jnp.all(known == jax.random.key_data(numpyro.prng_key()), -1))


def _known_keys(steps, particles):
    """Return what the particles' guides draw from their keys before the scan, and in each step."""
    keys = jax.random.split(jax.random.key(KEY), particles)

    def drawn(key):
        return jax.random.key_data(jax.random.split(key)[1])

    def in_step(number, key):
        return drawn(jax.random.split(_filter.step_key(jax.random.split(key, 3)[2], number))[0])

    start = jax.vmap(lambda k: drawn(jax.random.split(k, 3)[0]))(keys)
    return start, jnp.stack([jax.vmap(lambda k, i=i: in_step(i, k))(keys) for i in range(steps)])


def run_in(patch, steps=3):
    """Return what runs one filter for each outcome."""

    def run(objective, kind, draws, uniforms):
        particles = draws.shape[1]
        model, guide = chain(kind, draws, particles)
        elbo = TraceGrad_ELBO(particles, objective=objective)
        with patch.context() as inner:
            inner.setattr(_filter, "uniforms", lambda key, shape, dtype: array(uniforms).reshape(shape))
            xs = array(shared.X[:steps])
            params = {name: array(value) for name, value in shared.PARAMS.items()}
            return jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(KEY), p, model, guide, xs)))(params)

    return run


ALIKE = pytest.mark.exhaustive  # Of the filter itself, which Pyro's tests go through as well.


@pytest.mark.slow
@pytest.mark.parametrize(
    "short", ["score", "sometimes", "systematic", pytest.param("drop", marks=ALIKE), pytest.param("never", marks=ALIKE)]
)
def test_exact(short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch), monkeypatch, short)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("short", ["score", pytest.param("systematic", marks=ALIKE)])
@pytest.mark.parametrize("kind", ["global", "mixed"])
def test_sites_before_the_loop_and_reparameterized_ones_exact(kind, short, monkeypatch):
    shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


@pytest.mark.slow
@pytest.mark.parametrize("short", ["stop-gradient", pytest.param("stop-gradient systematic", marks=ALIKE)])
def test_evidence_exact(short, monkeypatch):
    shared.assert_evidence_exact(run_in(monkeypatch), monkeypatch, short)


QUICK = ("score_of_the_ancestors_lost", "weights_that_are_not_reset")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=ALIKE) for name in shared.MUTANTS]
)
def test_mutant_is_caught(name, monkeypatch):
    apply, short, check, kind = shared.MUTANTS[name]
    apply(monkeypatch)
    with pytest.raises(AssertionError):
        check(run_in(monkeypatch, 2), monkeypatch, short, 2, kind)


@pytest.mark.slow
def test_mutant_paths_that_forget_what_stood_before_is_caught(monkeypatch):
    """The values of a site before the loop stay with the particle and do not follow its ancestors."""
    plain = _filter._Rows.advance
    monkeypatch.setattr(
        _filter._Rows,
        "advance",
        lambda self, carry, origin, number: plain(self, carry, jnp.arange(len(origin)), number),
    )
    with pytest.raises(AssertionError):
        shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, "score", 2, "global")


def test_mutant_ancestors_of_one_side_alone_is_caught(monkeypatch):
    """The model's state does not follow the ancestors, the guide's does."""
    plain = _filter.descended

    def descended(state, flat):
        (guide, model), origin = plain(state, flat)
        return (guide, state[0][1]), origin

    monkeypatch.setattr(_filter, "descended", descended)
    with pytest.raises(AssertionError):
        shared.assert_exact(run_in(monkeypatch, 2), monkeypatch, "score", 2)


@pytest.mark.slow
def test_other_filters_are_a_baseline():
    """Two filters of two steps, each set against the other: unbiased over all their outcomes, and the mean of both bounds."""
    objective = shared.OBJECTIVES["score"]
    draws, uniforms, weights, _ = shared.table(objective, 1)
    count = len(weights)
    pairs = np.array([(i, j) for i in range(count) for j in range(count)])
    xs = array(shared.X[:1])
    params = {name: array(value) for name, value in shared.PARAMS.items()}
    rows = draws.reshape(2, count, 2)[:, pairs].reshape(2, len(pairs), 4)
    del uniforms

    def one(forced):
        model, guide = chain("discrete", forced, 4)
        elbo = TraceGrad_ELBO(4, objective=objective)
        return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(KEY), p, model, guide, xs))(params)

    losses, found = jax.jit(jax.vmap(one))(jnp.asarray(rows.transpose(1, 0, 2)))
    chance = weights[pairs].prod(1)
    np.testing.assert_allclose(-(chance @ losses), shared.expected_bound(shared.PARAMS, objective, 1).real, atol=1e-9)
    for name, exact in shared.derivative(lambda p: shared.expected_bound(p, objective, 1)).items():
        np.testing.assert_allclose(-np.tensordot(chance, found[name], 1), exact, atol=1e-9)


def elbo_of(particles=4, objective=FIVO(), **given):  # noqa: B008
    return TraceGrad_ELBO(particles, objective=objective, **given)


XS = np.array([0.4, -0.3])
PARAMS = shared.PARAMS


def refused(error, words, model=None, guide=None, elbo=None, params=PARAMS):
    model, guide = (given or plain for given, plain in zip((model, guide), chain(), strict=True))
    with pytest.raises(error, match=words):
        (elbo or elbo_of()).loss(jax.random.key(0), params, model, guide, XS)


def test_options_are_refused():
    for words, given in {
        "vectorize_particles other than True": {"vectorize_particles": False},
        "does not go with max_parallel": {"max_parallel": 4},
        "does not go with closed_form": {"closed_form": {"z": "kl"}},
        "does not go with sum_sites": {"sum_sites": False},
        "multi_sample_guide": {"multi_sample_guide": True},
    }.items():
        refused(ConfigurationError, words, elbo=elbo_of(**given))
    with pytest.raises(ConfigurationError, match="drop higher_order=True"):
        elbo_of(higher_order=True)
    with pytest.raises(ConfigurationError, match="combines 3 particles"):
        elbo_of(4, FIVO(samples=3))
    with pytest.raises(ConfigurationError, match="nothing can be checked"):
        check_gradients(*chain(), XS, elbo=elbo_of())


@pytest.mark.parametrize(
    "given",
    [
        {"samples": 0},
        {"samples": True},
        {"resampling": "stratified"},
        {"threshold": 1.5},
        {"resampling_gradient": "no"},
    ],
)
def test_settings_are_refused(given):
    with pytest.raises(ConfigurationError, match=rf"FIVO\({next(iter(given))}="):
        FIVO(**given)


def test_estimators_are_refused():
    for estimator in (DisARM(), VIMCO(), ScoreFunction(LeaveOneOut()), Enumerate()):
        refused(
            EstimatorError, "brings baselines of its own.*use ScoreFunction", elbo=elbo_of(estimators={"z": estimator})
        )
    refused(ConfigurationError, "nobody", elbo=elbo_of(estimators={"nobody": ScoreFunction()}))

    def own(xs):
        p = numpyro.param("own", 0.5)
        scanned(lambda x: numpyro.sample("z", dist.Bernoulli(logits=p)))(xs)

    held = elbo_of(4, FIVO(resampling_gradient="stop-gradient"))
    refused(ConfigurationError, "'own' is the guide's alone.*'score' or 'drop'", guide=own, elbo=held)


def bernoulli(name="z"):
    return numpyro.sample(name, dist.Bernoulli(array(0.5)))


def scanned(body, **given):
    """Return a program that scans a body over the data."""
    return lambda xs: scan(lambda carried, x: (carried, body(x)), 0.0, xs, **given)


@pytest.mark.slow
def test_programs_are_refused():
    def after(xs):
        chain()[1](xs)
        bernoulli("late")

    def subsampled(x):
        with numpyro.plate("data", 3, subsample_size=2):
            bernoulli()

    def growing(xs):
        scan(lambda carried, x: (jnp.append(carried, bernoulli()), None), jnp.zeros(1), xs)

    def conditioned(xs):
        handlers.condition(scanned(lambda x: (bernoulli(), bernoulli("y"))[0]), data={"y": jnp.zeros(2)})(xs)

    def scaled(xs):
        with handlers.scale(scale=2.0):
            scanned(lambda x: bernoulli())(xs)

    def before(xs):
        bernoulli()
        scanned(lambda x: bernoulli("other"))(xs)

    def impossible(x):
        numpyro.factor("x", -jnp.inf * (1.0 + bernoulli()))

    def hinted(x):
        numpyro.sample("z", dist.Bernoulli(0.5), infer={"estimator": ScoreFunction()})

    def branching(x):
        return cond(x > 0, lambda _: bernoulli(), lambda _: bernoulli(), None)

    plain = scanned(lambda x: bernoulli())
    refused(ProgramError, "The guide has no scan", guide=lambda xs: bernoulli())
    refused(ProgramError, "'late' of the guide stands after the loop", model=after, guide=after)
    refused(ProgramError, "has 1 steps and the model's has 2", guide=lambda xs: plain(xs[:1]))
    refused(ProgramError, "run in opposite directions", guide=scanned(lambda x: bernoulli(), reverse=True))
    refused(ProgramError, "Plate 'data' is subsampled", guide=scanned(subsampled))
    refused(ProgramError, "guide's loop over time has no steps", guide=lambda xs: plain(xs[:0]))
    refused(ProgramError, "shape", guide=growing)
    refused(ProgramError, "stands inside of scale", guide=scaled)
    refused(ProgramError, "stands inside of condition", model=conditioned, guide=plain)
    refused(ProgramError, "'z' of the guide is drawn before the scan, and not there in the model", guide=before)
    refused(ImpossibleValueError, "in step 0 ", model=scanned(impossible), guide=plain)
    refused(EstimatorError, "belong to the latent", model=scanned(hinted))
    refused(ProgramError, "inside cond or an inner scan", guide=scanned(branching))
    assert not jnp.isfinite(
        jax.jit(lambda: elbo_of().loss(jax.random.key(0), PARAMS, scanned(impossible), plain, XS))()
    )


@pytest.mark.slow
def test_a_scan_that_draws_nothing_is_no_loop_over_time():
    """A guide that reads ahead gives the same numbers whichever scan it reads with."""

    def reading(by):
        def guide(xs):
            g = numpyro.param("g", array(0.3))
            _, ahead = by(lambda h, x: (jnp.tanh(g * h + x),) * 2, array(0.0), xs, reverse=True)
            scan(lambda z, h: (numpyro.sample("z", dist.Normal(g * z + h, 1.0)), None), array(0.0), ahead)

        return guide

    def model(xs):
        def step(z, x):
            z = numpyro.sample("z", dist.Normal(0.5 * z, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        scan(step, array(0.0), xs)

    def found(by):
        run = jax.value_and_grad(lambda g: elbo_of().loss(jax.random.key(0), {"g": g}, model, reading(by), XS))
        return jax.jit(run)(0.3)

    np.testing.assert_allclose(found(scan), found(jax.lax.scan))


@pytest.mark.slow
def test_second_derivatives_are_refused():
    model, guide = chain()
    with pytest.raises(EstimatorError, match="first ones alone"):
        jax.hessian(lambda p: elbo_of().loss(jax.random.key(0), p, model, guide, XS))(PARAMS)


def test_reversed_scans_step_backwards():
    """A pair of programs that run backwards over the data is one that runs forwards over the data reversed."""

    def programs(reverse):
        def model(xs):
            def step(carried, x):
                z = numpyro.sample("z", dist.Normal(carried, 1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return z, None

            scan(step, 0.0, xs, reverse=reverse)

        def guide(xs):
            scan(
                lambda carried, x: (numpyro.sample("z", dist.Normal(carried + x, 1.0)), None), 0.0, xs, reverse=reverse
            )

        return model, guide

    found = [elbo_of().loss(jax.random.key(1), {}, *programs(flag), XS[::-1] if flag else XS) for flag in (False, True)]
    np.testing.assert_allclose(*found)


@pytest.mark.slow
def test_described_and_trained():
    model, guide = chain("mixed")
    guide = config_estimators(guide, {"w": ScoreFunction()})
    elbo = elbo_of(8, FIVO(samples=4, resampling_gradient="drop"))
    rows = {row["site"]: row for row in elbo.describe(jax.random.key(0), PARAMS, model, guide, XS).rows}
    assert rows["w"]["estimator"] == "ScoreFunction()" and rows["z"]["estimator"] == "Reparam()"
    assert "biased: FIVO(" in rows["w"]["reason"]
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), elbo)
    losses = svi.run(jax.random.key(0), 100, XS, progress_bar=False).losses
    assert losses[-30:].mean() < losses[:30].mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:shape requires ndarray")  # NumPyro's own, of state beside a scan.
def test_state_that_a_wrapper_keeps_stays():
    model, guide = chain()
    svi = SVI(model, config_estimators(guide), numpyro.optim.Adam(0.02), elbo_of())
    state = svi.init(jax.random.key(0), XS)
    assert jax.tree.structure(svi.update(state, XS)[0]) == jax.tree.structure(state)


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 6])
def test_sequences_in_a_plate_and_of_several_lengths(particles):
    """Steps that are masked change no weight: the bound is that of the shorter sequences. A scan may have no rows, and a key be a plain array."""
    lengths, xs = jnp.array([3, 1]), jnp.ones((2, 5))

    def program(observed, steps):
        def step(carried, _):
            z, number = carried
            with numpyro.plate("sequences", 2), handlers.mask(mask=number < lengths):
                z = numpyro.sample("z", dist.Normal(0.5 * z, 1.0))
                if observed:
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=xs[:, number])
            return (z, number + 1), None

        return lambda: scan(step, (jnp.zeros(2), 0), None, length=steps)

    def loss(steps):
        elbo = elbo_of(particles, FIVO(threshold=0))
        return elbo.loss(jax.random.PRNGKey(0), {}, program(True, steps), program(False, steps))

    np.testing.assert_allclose(loss(3), loss(5), rtol=1e-12)


@pytest.mark.slow
def test_each_series_has_its_filter_under_vmap():
    model, guide = chain()
    elbo, keys = elbo_of(4, FIVO(resampling_gradient="drop")), jax.random.split(jax.random.key(0), 3)
    series = jnp.asarray(np.linspace(-1, 1, 6).reshape(3, 2))

    def one(key, xs):
        return jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, xs))(PARAMS)

    single = jax.jit(one)
    together = jax.jit(jax.vmap(one))(keys, series)
    apart = [single(key, xs) for key, xs in zip(keys, series, strict=True)]
    for i, alone in enumerate(apart):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9), together, alone)


@pytest.mark.slow
def test_what_depends_on_a_site_before_the_scan_follows_the_ancestors():
    """Rows and constants of the scan that a global draw moves; the gradient is the slope of the loss along the same draws."""
    masks = jnp.arange(4)[:, None] < jnp.array([4, 2])

    def model(xs):
        s, m = numpyro.sample("s", dist.LogNormal(0.0, 1.0)), numpyro.param("m", 0.3)

        def step(carried, row):
            z, number = carried
            with numpyro.plate("series", 2), handlers.mask(mask=row[1]):
                z = numpyro.sample("z", dist.Normal(m * z + 0.1 * number, 1.0))
                numpyro.sample("x", dist.Normal(z, s), obs=row[0])
            return (z, number + 1), None

        scan(step, (jnp.zeros(2), 0), (xs, masks))

    def guide(xs):
        weights, q = numpyro.param("weights", 0.1 * jnp.ones((2, 2))), numpyro.param("q", jnp.array([0.1, -0.5]))
        s = numpyro.sample("s", dist.LogNormal(q[0], jnp.exp(q[1])))
        _, ahead = jax.lax.scan(lambda h, x: (jnp.tanh(weights @ h + x),) * 2, jnp.zeros(2), xs, reverse=True)

        def step(z, row):
            with numpyro.plate("series", 2), handlers.mask(mask=row[1]):
                z = numpyro.sample("z", dist.Normal(0.3 * z + row[0] / s, 1.0))
            return z, None

        scan(step, jnp.zeros(2), (ahead / s, masks))

    params = {"m": array(0.3), "weights": array(0.1 * np.ones((2, 2))), "q": array([0.1, -0.5])}
    xs, elbo = array(np.linspace(-1, 1, 8).reshape(4, 2)), elbo_of(8, FIVO(4, "systematic", 0.5, "drop"))
    loss = jax.jit(lambda p: elbo.loss(jax.random.key(3), p, model, guide, xs))
    slopes = jax.grad(loss)(params)
    for name, value in params.items():
        ahead, back = (loss({**params, name: value + step}) for step in (1e-6, -1e-6))
        np.testing.assert_allclose((ahead - back) / 2e-6, slopes[name].sum(), atol=1e-6)
