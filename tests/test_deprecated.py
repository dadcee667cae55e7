"""Names that moved: the old ones still work, and say where the new ones are."""

import importlib
from dataclasses import dataclass
from typing import ClassVar

import pytest

import pplgrad
from pplgrad.estimators import Alternatives, Declaration

MOVED = [
    ("pplgrad.objectives", "IWAE", pplgrad.IWAE),
    ("pplgrad.watch", "Watch", pplgrad.Watch),
    ("pplgrad.estimators.base", "Estimator", pplgrad.Estimator),
    ("pplgrad.estimators.base", "Declaration", Declaration),
    ("pplgrad.baselines.base", "Baseline", pplgrad.Baseline),
]


@pytest.mark.parametrize(("module", "name", "item"), MOVED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_name_that_moved_warns_and_works(module, name, item):
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is deprecated"):
        assert getattr(importlib.import_module(module), name) is item


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Elbo'"):
        importlib.import_module("pplgrad.objectives").Elbo  # noqa: B018


def test_branches_still_have_what_estimators_of_ones_own_imported():
    assert importlib.import_module("pplgrad.engine.branches").Alternatives is Alternatives


@pytest.mark.slow
def test_an_estimator_written_for_the_old_contract_works():
    with pytest.warns(DeprecationWarning, match="is deprecated and will be ignored") as seen:

        @dataclass(frozen=True)
        class Old(pplgrad.Estimator):
            declaration: ClassVar[Declaration] = pplgrad.ScoreFunction().declaration
            uses_score: ClassVar[bool] = True
            uses_branches: ClassVar[bool] = True
            draws_again: ClassVar[int] = 1

            def check(self, site):
                pass

            def alternatives(self, draw):
                return Alternatives(draw.again(1)[0])

            def surrogate_of(self, terms):
                return terms.ops.xp.sum(terms.draw.score * (terms.downstream - terms.costs[:, 0]))

    assert len(seen) == 2
    assert Old().num_resamples == 1
    from pplgrad.testing import gradient_error

    for library in ("pyro", "numpyro"):
        assert gradient_error(Old(), library, "single") < 1e-9
