"""Deliberately broken estimators that run branches: the checks must catch every one.

Each patches one piece of the mathematics and names a program, an estimator, and whether the check is exact or a z-test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pplgrad import (
    ARM,
    ARMS,
    CARMS,
    REBAR,
    RELAX,
    RODEO,
    DisARM,
    DoubleCV,
    Estimator,
    LocalExpectation,
    MeasureValued,
    MuProp,
    ScoreFunction,
    StickBreakingDisARM,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)
from pplgrad.core.draw import Draw
from pplgrad.engine import branches, layout
from pplgrad.estimators import (
    antithetic,
    antithetic_categorical,
    control_variates,
    local_expectation,
    measure_valued,
    perturbed,
    relax,
    relaxed,
    score,
    stein,
    without_replacement,
)


@dataclass(frozen=True)
class Mutant:
    """A broken variant: `apply(monkeypatch)` breaks it, `case` under `estimator` shows it."""

    apply: Callable[[Any], None]
    case: str
    estimator: Estimator
    exact: bool


MUTANTS: dict[str, Mutant] = {}


def mutant(case: str, estimator: Estimator, exact: bool = True):  # type: ignore[no-untyped-def]
    def register(apply):  # type: ignore[no-untyped-def]
        MUTANTS[apply.__name__] = Mutant(apply, case, estimator, exact)
        return apply

    return register


def after(patch, owner, name, change):
    """Let `change(self, terms, result)` have the last word over a method."""
    plain = getattr(owner, name)
    patch.setattr(owner, name, lambda self, terms: change(self, terms, plain(self, terms)))


def terms_of(patch, owner, change):
    """Let `change(terms)` alter what a term of the surrogate is made of."""
    plain = owner.branch_surrogate
    patch.setattr(owner, "branch_surrogate", lambda self, terms: plain(self, change(terms)))


@mutant("single", LocalExpectation())
def local_expectation_with_the_wrong_sign(patch):
    after(patch, local_expectation.LocalExpectation, "branch_surrogate", lambda self, terms, term: -term)


@mutant("categorical_index", LocalExpectation())
def local_expectation_in_the_wrong_order(patch):
    """Costs are given to the values as if their shift from the draw were their number."""
    plain = local_expectation.LocalExpectation.branch_surrogate

    def branch_surrogate(self, terms):
        draw = terms.draw
        draw.__dict__["index"] = draw.index * 0
        return plain(self, terms)

    patch.setattr(local_expectation.LocalExpectation, "branch_surrogate", branch_surrogate)


@mutant("coupled_plate", LocalExpectation())
def elements_of_a_coupled_plate_changed_at_once(patch):
    patch.setattr(layout, "_separable", lambda site, costs, depends: site.plates)


@mutant("hierarchy", LocalExpectation())
def branches_charged_with_the_primary_costs(patch):
    """The downstream cost of a branch is that of the draw."""
    terms_of(
        patch,
        local_expectation.LocalExpectation,
        lambda terms: replace(terms, costs=terms.costs * 0 + terms.downstream[:, None]),
    )


@mutant("single", ARM(), exact=False)
def arm_with_the_wrong_sign(patch):
    after(patch, antithetic.ARM, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", ARM(), exact=False)
def arm_with_a_uniform_that_forgets_the_draw(patch):
    plain = antithetic.ARM.alternatives

    def alternatives(self, draw):
        found = plain(self, draw)
        return replace(found, kept=draw.noise.uniform(tuple(found.kept.shape), found.kept))

    patch.setattr(antithetic.ARM, "alternatives", alternatives)


@mutant("event", DisARM())
def disarm_with_an_independent_partner(patch):
    plain = antithetic.DisARM.alternatives

    def alternatives(self, draw):
        probs = antithetic.probability(draw.ops, draw.logits)
        partner = draw.noise.bernoulli(probs)
        return branches.Alternatives(draw.embed(draw.ops.xp.astype(partner, draw.index.dtype)[:, None]), partner)

    assert plain
    patch.setattr(antithetic.DisARM, "alternatives", alternatives)


@mutant("single", DisARM())
def disarm_without_its_weight(patch):
    """ARM's ½ in the place of ½ σ(|α|)."""
    after(patch, antithetic.DisARM, "branch_surrogate", lambda self, terms, term: term * 1.7)


@mutant("hierarchy", DisARM())
def disarm_with_the_wrong_sign(patch):
    after(patch, antithetic.DisARM, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", ARMS(3), exact=False)
def arms_without_the_correlation(patch):
    patch.setattr(antithetic.ARMS, "_correlation", lambda self, xp, probs: probs * 0)


@mutant("single", ARMS(3), exact=False)
def arms_with_the_wrong_sign(patch):
    after(patch, antithetic.ARMS, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", ScoreFunction(samples=2))
def samples_centred_but_averaged_over_all(patch):
    """Σ (f_i − f̄) over k in the place of k − 1."""
    after(
        patch,
        score.ScoreFunction,
        "branch_surrogate",
        lambda self, terms, term: term * (self.samples - 1) / self.samples,
    )


@mutant("hierarchy", ScoreFunction(samples=2))
def samples_scored_as_the_draw(patch):
    def change(terms):
        kept = terms.alternatives.kept * 0 + terms.draw.score[:, None]
        return replace(terms, alternatives=replace(terms.alternatives, kept=kept))

    terms_of(patch, score.ScoreFunction, change)


@mutant("single", MuProp())
def muprop_without_what_it_takes_away(patch):
    """The gradient of the expansion is not added back."""
    plain = control_variates.MuProp.branch_surrogate

    def branch_surrogate(self, terms):
        draw, xp = terms.draw, terms.ops.xp
        back = xp.sum(terms.ops.stop_gradient(terms.slopes[:, 0]) * xp.exp(draw.log_probs))
        return plain(self, terms) - back

    patch.setattr(control_variates.MuProp, "branch_surrogate", branch_surrogate)


@mutant("single", MuProp())
def muprop_with_the_wrong_sign(patch):
    after(patch, control_variates.MuProp, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", DoubleCV(2))
def double_cv_that_sees_its_own_draw(patch):
    patch.setattr(
        control_variates, "_others", lambda xp, x: xp.broadcast_to(xp.mean(x, axis=1, keepdims=True), x.shape)
    )


@mutant("single", DoubleCV(2))
def double_cv_with_the_wrong_sign(patch):
    after(patch, control_variates.DoubleCV, "branch_surrogate", lambda self, terms, term: -term)


@mutant("chain", REBAR(0.5, 1.5, learn=False), exact=False)
def rebar_whose_noise_given_the_draw_moves_freely(patch):
    """s̃ has the gradient of s: the control variate's correction is missing."""
    patch.setattr(perturbed, "_given_choice", lambda ops, keys: keys * 0 + 1)
    patch.setattr(perturbed.PerturbedPair, "given", lambda self, along: along)


@mutant("chain", REBAR(0.5, 1.5, learn=False), exact=False)
def rebar_with_the_wrong_sign(patch):
    after(patch, control_variates.REBAR, "branch_surrogate", lambda self, terms, term: -term)


@mutant("chain", REBAR(0.5, 1.5, learn=False), exact=False)
def rebar_with_noise_that_forgets_the_draw(patch):
    def perturbed(self):
        xp, fixed = self.ops.xp, self.ops.stop_gradient(self.log_probs)
        return self.log_probs - xp.log(-xp.log(self.noise.uniform(tuple(fixed.shape), fixed)))

    def keys(self, count=None):
        u = self.noise.uniform(tuple(self.odds.shape), self.odds)
        return self.ops.stop_gradient(self.odds) + self.ops.xp.log(u) - self.ops.xp.log1p(-u)

    patch.setattr(relaxed.HardDraw, "perturbed", perturbed)
    patch.setattr(relaxed.HardPair, "keys", keys)
    patch.setattr(Draw, "uniform", lambda self, probs: None)  # NumPyro's are those of the draw.


@mutant("single", MeasureValued())
def measure_valued_with_the_wrong_sign(patch):
    after(patch, measure_valued.MeasureValued, "branch_surrogate", lambda self, terms, term: -term)


@mutant("categorical_index", UnorderedSet(2))
def unordered_set_without_its_ratio(patch):
    """Every value counts with its probability, as if the set had been all values."""
    plain = without_replacement._rest_probabilities
    patch.setattr(
        without_replacement, "_rest_probabilities", lambda ops, probs: tuple(x * 0 + 1 for x in plain(ops, probs))
    )


@mutant("categorical_index", UnorderedSet(2))
def unordered_set_drawn_with_replacement(patch):
    patch.setattr(
        without_replacement._Joint, "outside", lambda self, log_probs, numbers: self.draw.noise.categorical(log_probs)
    )


@mutant("categorical_index", SumAndSample(2))
def sum_and_sample_that_forgets_the_rest(patch):
    after(
        patch,
        without_replacement.SumAndSample,
        "branch_surrogate",
        lambda self, terms, term: (
            term
            - terms.ops.xp.sum(
                terms.alternatives.kept[:, -1]
                * (1 - terms.ops.xp.exp(terms.ops.stop_gradient(terms.alternatives.kept[:, 0])))
                * (terms.costs[:, -1] - terms.costs[:, 0])
            )
        ),
    )


@mutant("categorical_index", SumAndSample(2))
def sum_and_sample_with_the_wrong_sign(patch):
    after(patch, without_replacement.SumAndSample, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", StickBreakingDisARM())
def stick_breaking_with_the_wrong_sign(patch):
    after(patch, StickBreakingDisARM, "branch_surrogate", lambda self, terms, term: -term)


@mutant("counts", StickBreakingDisARM())
def sticks_whose_decisions_are_against_all_categories(patch):
    """The log odds of a category against all others instead of the later ones."""

    def decisions(categories):
        return 2 * np.eye(categories)[: categories - 1] - 1

    patch.setattr(StickBreakingDisARM, "decisions", staticmethod(decisions))


@mutant("single", TreeDisARM())
def tree_whose_partner_forgets_the_draw(patch):
    patch.setattr(antithetic_categorical, "partner_of", lambda noise, xp, probs, drawn: noise.bernoulli(probs))


@mutant("counts", TreeDisARM())
def tree_that_credits_the_draws_decisions_alone(patch):
    """Decisions that the partner alone passes are left out."""
    plain = TreeDisARM.alternatives

    def alternatives(self, draw):
        found = plain(self, draw)
        table = draw.ops.constant(self.decisions(draw.log_probs.shape[-1]), draw.log_probs)
        passed = antithetic_categorical._sides(draw, table, draw.index) != 0
        return replace(found, kept=found.kept * passed)

    patch.setattr(TreeDisARM, "alternatives", alternatives)


@mutant("single", CARMS(3), exact=False)
def carms_with_the_wrong_sign(patch):
    after(patch, CARMS, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", CARMS(3), exact=False)
def carms_with_the_law_squared(patch):
    plain = antithetic_categorical._pair_law

    def law(*given):
        return plain(*given) ** 2

    patch.setattr(antithetic_categorical, "_pair_law", law)


@mutant("categorical_index", CARMS(4), exact=False)
def carms_with_the_law_of_one_pair_for_all(patch):
    plain = antithetic_categorical._cell_law

    def law(*given):
        found = plain(*given)
        return found[:, :1] + 0 * found

    patch.setattr(antithetic_categorical, "_cell_law", law)


@mutant("single", RELAX(0.5, hidden=4), exact=False)
def relax_with_another_slope_than_that_of_the_network(patch):
    plain = relax._network

    def network(draw, weights, known):
        value, slopes = plain(draw, weights, known)
        return value, slopes + 3.0 * draw.ops.arange(weights.shape[-1], draw.index)

    patch.setattr(relax, "_network", network)


@mutant("single", RODEO(2, learn=False))
def rodeo_with_the_wrong_sign(patch):
    after(patch, RODEO, "branch_surrogate", lambda self, terms, term: -term)


@mutant("single", RODEO(2))
def rodeo_whose_operator_has_a_mean(patch):
    """The value that an element keeps is left out of the operator's sum over values."""
    plain = stein.RODEO._there
    patch.setattr(
        stein.RODEO, "_there", lambda self, xp, known, at, hard, here: plain(self, xp, known, at, hard, 0 * here)
    )


def draws(patch, change):
    """Let `change(plain, ops, layout, run, found)` compute what the other draws add to the costs."""
    plain = branches.at_every_draw
    patch.setattr(branches, "at_every_draw", lambda *given: change(plain, *given))


@mutant("single", DisARM(differentiate="all"))
def other_draws_not_differentiated(patch):
    def change(plain, ops, layout, run, found):
        return plain(ops, layout, run, {name: [ops.stop_gradient(x) for x in costs] for name, costs in found.items()})

    draws(patch, change)


@mutant("hierarchy", ScoreFunction(samples=2, differentiate="all"))
def own_draw_counted_too_often(patch):
    """The costs at the program's own draw are not made less where the others are added."""

    def change(plain, ops, layout, run, found):
        return plain(ops, layout, replace(run, costs=[ops.stop_gradient(x) for x in run.costs]), found)

    draws(patch, change)


@mutant("hierarchy", DisARM(differentiate="all"))
def draws_of_one_site_alone(patch):
    """The draws of the second site are left out where all of them are counted."""

    def change(plain, ops, layout, run, found):
        first = next(iter(found))
        held = {name: x if name == first else [ops.stop_gradient(c) for c in x] for name, x in found.items()}
        return plain(ops, layout, run, held)

    draws(patch, change)
