"""Deliberately broken posteriors of summed sites: the comparison with brute force catches every one."""

import jax
import jax.numpy as jnp
import pytest

from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._tracing import contraction, factors, marginal_laws, posterior_of_sums
from tests.covering import mostly
from tests.numpyro.against_brute_force import excess, off

pytestmark = pytest.mark.slow


def scale_inside_of_the_logarithm(monkeypatch):
    plain = marginal_laws.log_density
    monkeypatch.setattr(
        marginal_laws, "log_density", lambda site: plain(site) * (1 if site["scale"] is None else site["scale"])
    )


def a_factor_counted_twice(monkeypatch):
    plain = marginal_laws.log_density
    monkeypatch.setattr(marginal_laws, "log_density", lambda site: plain(site) * (2 if site["is_observed"] else 1))


def masks_ignored(monkeypatch):
    plain = marginal_laws.log_density
    monkeypatch.setattr(marginal_laws, "log_density", lambda site: plain({**site, "fn": unmasked(site["fn"])}))


def masks_of_summed_sites_kept(monkeypatch):
    monkeypatch.setattr(marginal_laws, "unmasked", lambda fn: fn)


def plates_in_the_wrong_order(monkeypatch):
    plain = posterior_of_sums._Part.laid_out

    def laid_out(self, f):
        x = plain(self, f)
        return jnp.swapaxes(x, 1, 2) if len(self.batch) == 2 else x

    monkeypatch.setattr(posterior_of_sums._Part, "laid_out", laid_out)


def time_shifted_by_one(monkeypatch):
    plain = posterior_of_sums._Densities.joined
    monkeypatch.setattr(
        posterior_of_sums._Densities,
        "joined",
        lambda self, of: {name: jnp.roll(x, 1, 0) for name, x in plain(self, of).items()},
    )


def first_steps_last(monkeypatch):
    def joined(self, of):
        return {name: jnp.concatenate([of(part) for part in reversed(parts)]) for name, parts in self.parts.items()}

    monkeypatch.setattr(posterior_of_sums._Densities, "joined", joined)


def the_parents_marginal(monkeypatch):
    """The numbers along the step before are taken for those along the step itself."""

    def of_own(self, f):
        before = next((name for name in f.names if name.startswith("_PREV_" + self.name)), self.name)
        f = f.multiplied_over(set(f.names) - self.dims.plates - {before, self.dims.time})
        return factors.Factor(f.data, tuple(self.name if name == before else name for name in f.names))

    monkeypatch.setattr(posterior_of_sums._Part, "of_own", of_own)


def padding_counts(monkeypatch):
    monkeypatch.setattr(posterior_of_sums, "_counting", lambda densities: None)


def masked_sites_never_count(monkeypatch):
    monkeypatch.setattr(posterior_of_sums, "_reads", lambda densities: [])


def one_step_of_padding_alone(monkeypatch):
    """A masked step counts if it is read by the next one, also where that does not count."""
    plain = posterior_of_sums._read
    monkeypatch.setattr(posterior_of_sums, "_read", lambda varies, reader, *rest: plain(varies, None, *rest))


def padding_is_not_predicted(monkeypatch):
    plain = posterior_of_sums._Densities.indices

    def indices(self, changed, ring):
        return plain(self, getattr(self, "_kept", changed), ring) if not hasattr(self, "_kept") else self._found

    def kept(self, changed, ring):
        found = indices(self, changed, ring)
        self._kept, self._found = changed, found
        return found

    monkeypatch.setattr(posterior_of_sums._Densities, "indices", kept)


def each_site_by_itself(monkeypatch):
    """The most probable value of each site, and not of all together."""
    monkeypatch.setattr(posterior_of_sums, "MostProbable", factors.Ring)


MUTANTS = {
    scale_inside_of_the_logarithm: ("subsampled", "marginals"),
    a_factor_counted_twice: ("two steps", "marginals"),
    masks_ignored: ("scan under a summed site", "marginals"),
    masks_of_summed_sites_kept: ("masked chain", "marginals"),
    plates_in_the_wrong_order: ("tree", "marginals"),
    time_shifted_by_one: ("two steps", "marginals"),
    first_steps_last: ("two steps", "marginals"),
    the_parents_marginal: ("two steps", "marginals"),
    padding_counts: ("padded", "map"),
    masked_sites_never_count: ("masked chain", "map"),
    one_step_of_padding_alone: ("padded", "map"),
    padding_is_not_predicted: ("scan with a plate", "map"),
    each_site_by_itself: ("left to right", "map"),
}


@pytest.mark.parametrize(
    "mutant",
    mostly(set(MUTANTS) - {plates_in_the_wrong_order, padding_is_not_predicted}, MUTANTS),
    ids=lambda mutant: mutant.__name__,
)
def test_mutant_is_caught(mutant, monkeypatch):
    name, kind = MUTANTS[mutant]
    mutant(monkeypatch)
    assert off(name, 1, (kind,))[kind] > 1e-6


def samples_of_each_site_by_itself(monkeypatch):
    def of(component, key):
        densities = posterior_of_sums._Densities(component)
        found, possible = densities.derivatives({}, factors.Ring())
        return densities.values({k: jax.random.categorical(key, jnp.log(x)) for k, x in found.items()}), possible

    monkeypatch.setattr(posterior_of_sums, "samples", of)


def one_key_for_all_sums(monkeypatch):
    def keys(self, steps=None):
        return self._key if steps is None else jnp.broadcast_to(self._key, (steps,))

    monkeypatch.setattr(factors.Sampled, "keys", keys)


def data_left_out(monkeypatch):
    plain = marginal_laws.log_density
    monkeypatch.setattr(marginal_laws, "log_density", lambda site: plain(site) * (site["name"] != "x"))


def steps_are_sampled_forward_alone(monkeypatch):
    """What is sampled at each step is passed on to the next, and not what is passed back to the one before."""
    plain = contraction._recursion

    def recursion(time, step, start, lags, ring):
        return plain(time, step, start, lags, factors.Ring())

    monkeypatch.setattr(contraction, "_recursion", recursion)


SAMPLE_MUTANTS = {
    samples_of_each_site_by_itself: "tree",
    data_left_out: "mixture",
    one_key_for_all_sums: "two steps",
    steps_are_sampled_forward_alone: "two steps",
}


@pytest.mark.parametrize("mutant", SAMPLE_MUTANTS, ids=lambda x: x.__name__)
def test_mutant_of_samples_is_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    assert excess(SAMPLE_MUTANTS[mutant]) > 4
