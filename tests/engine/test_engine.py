"""The engine alone, on NumPy arrays: dependencies, downstream costs, baselines' running state, configuration."""

import numpy as np
import pytest

from pplgrad import (
    IWAE,
    RELAX,
    RODEO,
    ConfigurationError,
    DecayingAverage,
    LeaveOneOut,
    LocalExpectation,
    NeuralBaseline,
    Reparam,
    ScoreFunction,
)
from pplgrad.configuration import EstimatorMapping, collect_mappings, default_estimator, report_mapping
from pplgrad.core.baseline import BaselineTerms
from pplgrad.core.plates import AFTER, BEFORE, EVERY, OWN, SAME, WHOLE, Plate, Read
from pplgrad.core.shapes import to_shape
from pplgrad.core.site_info import SiteInfo
from pplgrad.core.sites import CostSpec, SiteSpec
from pplgrad.engine.dependencies import compose, cost_dependencies, site_dependencies
from pplgrad.engine.downstream import downstream, joined_costs
from pplgrad.engine.layout import Layout
from pplgrad.engine.upstream import UpstreamSites, call_with_sites, default_inputs
from pplgrad.errors import BaselineError, ProgramError

DATA = Plate("data", -1, 3, 3)
OUTER = Plate("outer", -2, 2, 2)
TIME = Plate("_time", -3, 4, 4, time=True)
SCORE = ScoreFunction()


class NumPyOps:
    xp = np

    def stop_gradient(self, x):
        return x

    def stack(self, arrays, axis):
        return np.stack(arrays, axis=axis)

    def contract(self, weights, values):
        return np.tensordot(weights, values, 1)

    def constant(self, values, like):
        return np.asarray(values, like.dtype)

    def take(self, x, index):
        return x[index]

    def rows(self, x, index):
        return x[index]

    def index_add(self, x, index, values):
        result = x.copy()
        np.add.at(result, index, values)
        return result

    def arange(self, n, like):
        return np.arange(n)


OPS = NumPyOps()


def every(*names):
    return dict.fromkeys(names, OWN)


def at(**flags):
    return {name: Read(steps, frozenset()) for name, steps in flags.items()}


def test_dependencies_are_closed_through_draws():
    sites = [SiteSpec("a", (), SCORE), SiteSpec("b", (), SCORE, every("a")), SiteSpec("c", (), SCORE, every("b"))]
    closed = site_dependencies(sites)
    assert closed["c"].keys() == {"a", "b"} and closed["a"] == {}
    (found,) = cost_dependencies(sites, [CostSpec("x", (), 1.0, every("c"))], closed)
    assert found.keys() == {"a", "b", "c"}


def test_steps_compose():
    assert compose(SAME, SAME) == SAME and compose(SAME | AFTER, AFTER) == AFTER
    assert compose(BEFORE, AFTER) == EVERY and compose(0, EVERY) == 0
    sites = [SiteSpec("z", (TIME,), SCORE, at(z=AFTER)), SiteSpec("w", (TIME,), SCORE, at(z=SAME, w=AFTER))]
    closed = site_dependencies(sites)
    assert closed["w"] == at(z=SAME | AFTER, w=AFTER) and closed["z"] == at(z=AFTER)


def totals(sites, costs, arrays):
    layout = Layout.build(sites, costs)
    stacks = [joined_costs(OPS, arrays, group) for group in layout.cost_groups]
    return {
        layout.sites[i].name: downstream(OPS, layout, g, stacks)[:, k]
        for g, group in enumerate(layout.site_groups)
        for k, i in enumerate(group.members)
    }


def test_costs_are_reduced_to_the_sites_plates():
    rng = np.random.default_rng(0)
    sites = [SiteSpec("g", (), SCORE), SiteSpec("z", (DATA,), SCORE, every("g")), SiteSpec("r", (), Reparam())]
    costs = [
        CostSpec("g", (), -1.0, every("g")),
        CostSpec("z", (DATA,), -1.0, every("g", "z")),
        CostSpec("x", (DATA, OUTER), 1.0, every("z")),
        CostSpec("alone", (), 1.0, {}),
    ]
    arrays = [rng.normal(size=shape) for shape in [(2,), (2, 3), (2, 2, 3), (2,)]]
    found = totals(sites, costs, arrays)
    np.testing.assert_allclose(found["z"], -arrays[1] + arrays[2].sum(1))
    np.testing.assert_allclose(found["g"], -arrays[0] - arrays[1].sum(1) + arrays[2].sum((1, 2)))
    assert found.keys() == {"g", "z"}


def test_a_site_in_more_plates_gets_the_costs_of_fewer():
    sites = [SiteSpec("v", (DATA, OUTER), SCORE)]
    cost = np.arange(3.0)[None]
    found = totals(sites, [CostSpec("x", (DATA,), 1.0, every("v"))], [cost])
    np.testing.assert_allclose(found["v"], np.broadcast_to(cost[:, None], (1, 2, 3)))


def test_a_path_that_leaves_a_plate_meets_every_element():
    """z and w in plates, g outside of one of them, then the data in all plates again: costs are summed where the path left."""
    rng = np.random.default_rng(0)
    sites = [
        SiteSpec("z", (DATA, OUTER), SCORE),
        SiteSpec("w", (DATA,), SCORE, every("z")),
        SiteSpec("g", (OUTER,), SCORE, every("z")),
        SiteSpec("h", (), SCORE, every("w")),
    ]
    costs = [
        CostSpec("x", (DATA, OUTER), 1.0, every("g")),
        CostSpec("y", (DATA, OUTER), 1.0, every("w")),
        CostSpec("v", (DATA, OUTER), 1.0, every("z", "h")),
        CostSpec("u", (DATA, OUTER), 1.0, {"z": Read(EVERY, frozenset({"data"})), **every("w")}),
        CostSpec("t", (DATA, OUTER), 1.0, {"w": WHOLE}),
    ]
    x, y, v, u, t = arrays = [rng.normal(size=(2, 2, 3)) for _ in costs]
    found = totals(sites, costs, arrays)

    def whole(a, *axes):
        return a.sum(axes, keepdims=True)

    # z reaches x through g alone, which has no data plate; y through w, without the outer one; v and t through both ways.
    wanted = whole(x, 2) + whole(y, 1) + whole(v, 1, 2) + whole(u, 1, 2) + whole(t, 1, 2)
    np.testing.assert_allclose(found["z"], np.broadcast_to(wanted, (2, 2, 3)))
    np.testing.assert_allclose(
        found["w"], (y.sum(1) + u.sum(1) + whole(v, 1, 2)[:, 0] + whole(t, 1, 2)[:, 0]) * np.ones((2, 3))
    )
    np.testing.assert_allclose(found["g"], x.sum(2, keepdims=True))
    np.testing.assert_allclose(found["h"], v.sum((1, 2)))


def test_only_own_elements_can_take_other_values_at_once():
    estimator = LocalExpectation()
    sites = [SiteSpec("z", (DATA, OUTER), estimator), SiteSpec("g", (OUTER,), SCORE, every("z"))]
    for cost, plates in (
        (CostSpec("x", (DATA, OUTER), 1.0, every("z")), (DATA, OUTER)),
        (CostSpec("x", (DATA, OUTER), 1.0, every("g")), (OUTER,)),
        (CostSpec("x", (DATA, OUTER), 1.0, {"z": Read(EVERY, frozenset({"outer"}))}), (DATA,)),
    ):
        layout = Layout.build(sites, [cost])
        (group,) = (group for group in layout.site_groups if group.members == (0,))
        assert group.plates == plates


def test_a_path_that_leaves_a_plate_has_no_weights_in_it():
    sites = [SiteSpec("z", (DATA,), SCORE), SiteSpec("w", (DATA,), SCORE, {"z": WHOLE})]
    with pytest.raises(ProgramError, match="site 'x' in plate 'data' depends on other elements of site 'z'"):
        Layout.build(sites, [CostSpec("x", (DATA,), 1.0, every("w"))], IWAE())
    assert Layout.build(sites, [CostSpec("x", (DATA,), 1.0, every("w"))], IWAE(plates=())).weight_plates == ()


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (SAME, lambda c: c),
        (AFTER, lambda c: np.cumsum(c[::-1])[::-1] - c),
        (BEFORE, lambda c: np.cumsum(c) - c),
        (SAME | AFTER, lambda c: np.cumsum(c[::-1])[::-1]),
        (EVERY, lambda c: np.full(4, c.sum())),
    ],
)
def test_costs_along_time(flags, wanted):
    cost = np.array([1.0, 10.0, 100.0, 1000.0])
    found = totals(
        [SiteSpec("z", (TIME,), SCORE)], [CostSpec("x", (TIME,), 1.0, at(z=flags))], [cost.reshape(1, 4, 1, 1)]
    )
    np.testing.assert_allclose(found["z"].ravel(), wanted(cost))


@pytest.mark.parametrize(
    ("reads", "ways"),
    [
        ({"x": "b", "y": "abc", "z": "ab", "w": "b", "v": "ba"}, "cumulative"),
        ({"x": "a", "y": "c", "z": "b", "w": "a"}, "picked"),
        ({"x": "abc", "y": "abc", "z": ""}, "shared"),
        ({"x": "a", "y": "ab", "z": "c", "w": "abc"}, "product"),
    ],
)
def test_shared_sums(reads, ways):
    """Each site gets the signed costs that read it, in whichever way they are added up."""
    sites = [SiteSpec(name, (), SCORE) for name in "abc" if any(name in r for r in reads.values())]
    costs = [CostSpec(name, (), (-1.0) ** i, every(*r)) for i, (name, r) in enumerate(reads.items())]
    arrays = list(np.random.default_rng(0).normal(size=(len(costs), 2)))
    (link,) = Layout.build(sites, costs).links[0]
    (sums,) = link.sums.values()
    same = sums.ends is not None and (sums.ends == sums.ends[0]).all()
    assert ways == (
        "product" if sums.order is None else "picked" if sums.ends is None else "shared" if same else "cumulative"
    )
    for name, found in totals(sites, costs, arrays).items():
        wanted = sum(cost.sign * x for cost, x in zip(costs, arrays, strict=True) if name in cost.reads)
        np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_an_impossible_cost_is_charged_to_no_draw_after_it():
    sites = [SiteSpec(name, (), SCORE, every(*"ab"[:i])) for i, name in enumerate("ab")]
    found = totals(
        sites,
        [CostSpec("x", (), 1.0, every("a")), CostSpec("y", (), 1.0, every("b"))],
        list(np.array([[-np.inf], [2.0]])),
    )
    assert found["a"] == -np.inf and found["b"] == 2


def test_undeclared_batch_dimensions_are_summed():
    x = np.arange(24.0).reshape(1, 2, 4, 3)
    np.testing.assert_allclose(to_shape(OPS, x, (3,)), x.sum((1, 2)))
    np.testing.assert_allclose(to_shape(OPS, x, ()), x.sum((1, 2, 3)))
    np.testing.assert_allclose(to_shape(OPS, x, (2, 1, 3)), x.sum(2, keepdims=True))


def terms(cost, state, plates=(), indices=None):
    return BaselineTerms("z", OPS, cost, plates, indices or {}, state, lambda: cost, lambda: cost)


def test_running_averages_by_element_and_by_particle():
    baseline = DecayingAverage(0.5, per_element=True)
    plate = Plate("data", -1, 2, 4)
    state = {name: np.zeros(shape) for name, shape in baseline.state_shapes((plate,)).items()}
    cost = np.array([[1.0, 2.0], [3.0, 4.0]])
    # Each particle has drawn its own elements; element 3 was drawn by both.
    index = {"data": np.array([[0, 3], [3, 1]])}
    value, _, state = baseline.evaluate(terms(cost, state, (plate,), index))
    assert (value == 0).all()
    np.testing.assert_allclose(state["mean"], 0.5 * np.array([1.0, 4.0, 0.0, 2.5]))
    value, _, _ = baseline.evaluate(terms(cost, state, (plate,), {"data": np.array([[2, 3], [0, 1]])}))
    np.testing.assert_allclose(value, [[0.0, 2.5], [1.0, 4.0]])


def test_leave_one_out_alone_is_nothing():
    assert LeaveOneOut().evaluate(terms(np.ones((1, 3)), {})).value == 0
    np.testing.assert_allclose(LeaveOneOut().evaluate(terms(np.array([1.0, 2.0, 6.0]), {})).value, [4.0, 3.5, 1.5])


def test_mapping_and_defaults():
    one, two = ScoreFunction(), Reparam()
    mapping = EstimatorMapping.of({"z*": one, "*": two, "z9": two, "never": one}, "here")
    assert mapping.find("z1") is one and mapping.find("z9") is two and mapping.find("a") is two
    assert mapping.unmatched() == ["never"]
    with pytest.raises(ConfigurationError, match="not a site name"):
        EstimatorMapping.of({1: one}, "here")
    with collect_mappings() as collected:
        report_mapping(mapping, lambda: None, "another ELBO")
        report_mapping(mapping, lambda: None, "another ELBO")
    assert collected == [mapping]
    report_mapping(mapping, lambda: None, "another ELBO")
    assert len(collected) == 1

    def default(rsample, particles, stateful=True):
        return default_estimator(SiteInfo("z", "D", rsample, not rsample, particles), stateful)

    assert default(True, 1) == Reparam() and default(False, 3) == ScoreFunction(LeaveOneOut())
    assert default(False, 1, False) == ScoreFunction()
    first, second = default(False, 1).baseline.parts
    assert first == DecayingAverage(0.9) and isinstance(second, NeuralBaseline)


def test_upstream_sites():
    sites = UpstreamSites("b", {"a": 1, "b": 2, "c": 3}, {"a": {}, "b": every("a"), "c": every("a", "b")})
    assert list(sites) == ["a"] and sites["a"] == 1 and len(sites) == 1
    for name in ("b", "c", "d"):
        with pytest.raises(BaselineError, match="site 'b' reads"):
            sites[name]
    assert call_with_sites(lambda x, sites: (x, len(sites)), (5,), {}, sites) == (5, 1)
    assert call_with_sites(lambda x: x, (5,), {}, sites) == 5


def test_default_inputs():
    plate = Plate("data", -1, 2, 4)
    full, sub = np.arange(12.0).reshape(4, 3), np.arange(10.0).reshape(2, 5)
    found = default_inputs(OPS, (plate,), {"data": np.array([3, 0])}, [full, sub, np.ones(7)])
    np.testing.assert_allclose(found, np.concatenate([full[[3, 0]], sub], -1))
    assert default_inputs(OPS, (), {}, [full]) is None
    assert default_inputs(OPS, (plate,), {}, [np.ones(7)]) is None


@pytest.mark.parametrize("make", [lambda: RODEO(scale=2.0), lambda: RELAX(scale=2.0, through_cost=False)])
def test_an_option_that_would_do_nothing_is_refused(make):
    with pytest.raises(ConfigurationError, match="scale=2.0"):
        make()
