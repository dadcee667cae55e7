"""Programs whose paths leave a plate and come back, or mix its elements inside: exact, or refused in a sentence that names both sites."""

import pytest

from pplgrad import IWAE, VIMCO, LocalExpectation, ProgramError, Renyi, ScoreFunction
from pplgrad.engine.layout import Layout
from pplgrad.pyro import TraceGrad_ELBO, _compat
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.testing import gradient_error, z_score
from pplgrad.testing.in_pyro import HOST, fresh
from pplgrad.testing.programs import CASES
from pplgrad.testing.reentering import REENTERED
from tests.reentering import BRANCHED, RANDOM, REFUSED

QUICK = {
    "reentered_plate",
    "reentered_by_lookup",
    "mixed_in_plate_sum",
    "mixed_reverse",
    "mixed_matrix",
    "mixed_in_data",
}
# Pyro goes through branches one by one, so that programs of many outcomes take minutes.
SMALL = {
    "reentered_plate",
    "mixed_in_plate_sum",
    "mixed_in_one_of_two",
    "mixed_reverse",
    "mixed_table",
    "mixed_by_site",
}


@pytest.mark.grid(together="reentered in Pyro")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in REENTERED])
def test_exact(name):
    assert gradient_error(ScoreFunction(), "pyro", name) < 1e-9


@pytest.mark.grid(together="reentered in Pyro")
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), [(s, n) for s, (_, names) in BRANCHED.items() for n in names if n in SMALL])
def test_exact_with_branches(short, name):
    assert gradient_error(BRANCHED[short][0], "pyro", name) < 1e-9


@pytest.mark.exhaustive
@pytest.mark.grid(together="reentered in Pyro")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "name"),
    [pytest.param("rebar", "reentered_plate", marks=pytest.mark.exhaustive), ("arm", "mixed_reverse")],
)
def test_unbiased(short, name):
    assert z_score(RANDOM[short][0], "pyro", name, draws=4000) < 4.5


@pytest.mark.grid
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.5)], ids=["iwae", "renyi"])
def test_weights_of_elements_are_refused(name, objective):
    case = REENTERED[name]
    fresh(case)
    model, guide = case.build(HOST)
    elbo = TraceGrad_ELBO(2, estimators={"*": VIMCO()}, objective=objective)
    with pytest.raises(ProgramError, match=REFUSED[name]):
        elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("name", [n for n in CASES if "plate" in n or "sub" in n or n in ("scaled", "masked")])
def test_elements_of_ordinary_plates_stay_apart(name, monkeypatch):
    """Rao-Blackwellisation is not lost: nothing in these programs is charged with other elements than its own."""
    across, plain = set(), Layout.build.__func__

    def build(cls, sites, costs, objective=None):
        across.update(
            (spec.name, other, read.across) for spec in (*sites, *costs) for other, read in spec.reads.items()
        )
        return plain(cls, sites, costs, objective)

    monkeypatch.setattr(Layout, "build", classmethod(build))
    case = CASES[name]
    fresh(case)
    TraceGrad_ELBO(estimators={"*": ScoreFunction()}).loss_and_grads(*case.build(HOST))
    assert not [found for found in across if found[2] is None or found[2]]


MIXING = {
    "sum": "mixed_in_plate_sum",
    "flip": "mixed_reverse",
    "cumsum": "mixed_cumulative",
    "sort": "mixed_sorted",
    "gather": "mixed_table",
    "index": "mixed_lookup",
    "cat": "mixed_before",
}


@pytest.mark.parametrize("operation", MIXING)
def test_an_operation_that_counts_as_elementwise_is_caught(operation, monkeypatch):
    """What it makes, and what is made of that, has the plate along its last axis: the program that mixes by it is biased then."""
    plain, seen = Provenance._axes, []

    def axes(self, func, args, kwargs, out, bits):
        if func._schema.name == f"aten::{operation}":
            seen.append(operation)
        if not seen or not out.dim():
            return plain(self, func, args, kwargs, out, bits)
        last = out.dim() - 1
        return {(out.stride(last), out.shape[last], out.storage_offset()): bits & self._of_plates}

    monkeypatch.setattr(Provenance, "_axes", axes)
    monkeypatch.setattr(_compat, "exempting", False)  # So that every operation asks it.
    assert gradient_error(ScoreFunction(), "pyro", MIXING[operation]) > 1e-6
    assert seen


def test_branches_of_mixed_elements_are_not_run_at_once():
    assert gradient_error(LocalExpectation(), "pyro", "mixed_in_plate_sum") < 1e-9
