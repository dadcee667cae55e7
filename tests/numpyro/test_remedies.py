"""What a refusal recommends is accepted at that very site, in a guide that nothing wraps."""

import jax
import pytest

from pplgrad import IWAE
from pplgrad.core.objectives import ELBO
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.testing.in_numpyro import HOST
from tests.remedies import SITES, program, text_of, wrong_advice

ELBOS = {
    "elbo": (ELBO(), 1, False),
    "higher": (ELBO(), 1, True),
    "iwae-2": (IWAE(), 2, False),
}
MAIN = ("bernoulli-event", "categorical-4100", "one-hot", "poisson", "normal")
ROWS = [
    pytest.param(site, short, marks=() if (site, short) == ("one-hot", "elbo") else pytest.mark.slow)
    for short in ELBOS
    for site in SITES
    if short == "elbo" or site in MAIN
]


@pytest.mark.grid(together="remedies")
@pytest.mark.parametrize(("site", "short"), ROWS)
def test_remedies_are_accepted(site, short):
    run = program(HOST, site)
    objective, particles, order = ELBOS[short]

    def refusal(estimator):
        elbo = TraceGrad_ELBO(particles, estimators={"z": estimator}, objective=objective, higher_order=order)
        told = text_of(lambda: jax.eval_shape(lambda key: elbo.loss(key, {}, run, run), jax.random.key(0)))
        # What learns something is refused on a bare guide whatever the site is.
        return None if told is not None and "only a wrapped guide can register it" in told else told

    assert wrong_advice(refusal) == {}
