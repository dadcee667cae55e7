"""Estimators as text."""

import pytest

from pplgrad import REBAR, DisARM, LeaveOneOut, NeuralBaseline, PplgradError, Reparam, ScoreFunction
from pplgrad.diagnostics.code import code
from pplgrad.lab.script import ScriptError
from pplgrad.lab.specs import NAMES, specification


def test_what_depends_on_the_clock_is_no_part_of_a_study():
    with pytest.raises(ScriptError, match="measures times.*pplgrad choose"):
        specification("z1=Auto(measure=True)")


def test_sites_patterns_and_particles():
    found = specification(" z1=DisARM(), layer*=ScoreFunction(LeaveOneOut()) @4")
    assert found.mapping(("other",)) == {"z1": DisARM(), "layer*": ScoreFunction(LeaveOneOut())}
    assert found.particles == 4
    both = specification("REBAR(0.5, learn=False), w=Reparam()")
    assert both.mapping(("a", "b")) == {"a": REBAR(0.5, learn=False), "b": REBAR(0.5, learn=False), "w": Reparam()}


def test_networks_get_the_scripts_inputs_unless_they_have_their_own():
    def inputs(x):
        return x

    made = specification("score+average+neural").mapping(("z",), inputs)["z"].baseline
    assert [getattr(part, "inputs", None) for part in made.parts] == [None, inputs]
    assert specification("ScoreFunction(NeuralBaseline(hidden=(8,)))").mapping(("z",), inputs)["z"].baseline.hidden == (
        8,
    )


@pytest.mark.parametrize(
    "text", ["ScoreFunction(LeaveOneOut())", "ARMS(n=3)", "GumbelSoftmax(1.0, hard=True)", "VIMCO()"]
)
def test_code_is_read_back(text):
    made = specification(text).all[0]
    assert specification(code(made)).all[0] == made


@pytest.mark.parametrize(
    "text",
    ["", "DisARM", "DisARM(),", "z=DisARM(),z=ARM()", "DisARM()@many", "DisARM()@0", "open('x')", "(lambda: 0)()", "IWAE()",
     "LeaveOneOut()", "ARMS(0)", "ARMS(foo=2)", "DisARM().check", "z=", "score+loo+", "[DisARM()]"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_sentence(text):
    with pytest.raises(PplgradError) as refusal:
        specification(text)
    assert "\n" not in str(refusal.value)


def test_every_public_estimator_can_be_named():
    import pplgrad

    made = [name for name in pplgrad.__all__ if isinstance(getattr(pplgrad, name), type)]
    assert {n for n in made if issubclass(getattr(pplgrad, n), pplgrad.Estimator)} - {"Estimator"} <= set(NAMES)
    assert isinstance(specification("score+neural").all[0].baseline, NeuralBaseline)
