"""Dependencies are found by watching a run: what the watch must see, and when what it saw may be used again."""

import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._reuse.guards import Guard
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.testing.in_pyro import (
    HOST,
    Force,
    array,
    assert_same,
    exact_gradient,
    expected_gradient,
    fresh,
    gradient,
    outcomes,
)
from pplgrad.testing.programs import Case


def bern(name, logits):
    return pyro.sample(name, dist.Bernoulli(logits=logits))


def case(model_body, latents=("z", "w")):
    """Two guide sites, the second reading the first, and a model given by a function of (b, z, w)."""

    def build(_):
        def model():
            b = pyro.param("b", array([0.3, -0.8, 1.1]))
            z = bern("z", b[0])
            w = bern("w", b[1] * z)
            model_body(b, z, w)

        def guide():
            a = pyro.param("a", array([0.4, -0.2, 0.9]))
            z = bern("z", a[0])
            bern("w", a[1] + a[2] * z)

        return model, guide

    params = {"a": np.array([0.4, -0.2, 0.9]), "b": np.array([0.3, -0.8, 1.1])}
    return Case("inline", params, dict.fromkeys(latents, ((), 2)), build)


def observe(name, loc):
    pyro.sample(name, dist.Normal(loc, array(1.0)), obs=array(0.6))


def branch_on_item(b, z, w):
    observe("x", b[2] if z.item() > 0.5 else -b[2] * 3)


def branch_on_bool(b, z, w):
    if w == 1:
        observe("x", b[2] + 2.0)
    else:
        observe("y", b[2] * 0.5)
        observe("y2", b[1])


def through_numpy(b, z, w):
    observe("x", b[2] * array(z.numpy() * 2 + 1))


def through_list(b, z, w):
    observe("x", b[2] * torch.tensor([z.tolist(), 1.0]).sum())


def through_new_tensor(b, z, w):
    observe("x", b[2] * torch.tensor([z, w, 0.5]).sum())


def in_place(b, z, w):
    buffer = torch.zeros(2)
    view = buffer[1:]
    buffer[0] = z
    view.copy_(w * z)
    observe("x", b[2] * buffer.sum())


def masked_by_value(b, z, w):
    with poutine.mask(mask=z.bool()):
        observe("x", b[2] + w)


def scaled_by_value(b, z, w):
    with poutine.scale(scale=z + 0.5):
        observe("x", b[2] * 1.0)


def through_vmap(b, z, w):
    observe("x", b[2] * torch.vmap(lambda t: t * 3 + 1)(torch.stack([z, w])).sum())


def through_nonzero(b, z, w):
    observe("x", b[2] * torch.stack([z, w]).nonzero().shape[0])


def double(x):
    return x * 2.0 + 1.0


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    traced = torch.jit.trace(double, torch.zeros(()))


def through_script(b, z, w):
    observe("x", b[2] * traced(z))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def through_function(b, z, w):
    observe("x", b[2] * Double.apply(z))


PROGRAMS = [
    branch_on_item,
    branch_on_bool,
    through_numpy,
    through_list,
    through_new_tensor,
    in_place,
    masked_by_value,
    scaled_by_value,
    through_vmap,
    through_nonzero,
    through_script,
    through_function,
]


@pytest.mark.grid
@pytest.mark.parametrize("body", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fresh_elbo", [True, False], ids=["first-step", "one-elbo"])
def test_every_way_a_value_travels(body, fresh_elbo):
    """The gradient is exact however a value reaches a cost, at a first step and with a structure kept from others."""
    program = case(body)
    one = TraceGrad_ELBO(estimators={"*": ScoreFunction()})

    def make():
        return one

    if fresh_elbo:
        total = {name: np.zeros(value.shape) for name, value in program.params.items()}
        model, guide = program.build(HOST)
        for outcome in outcomes(program):
            found = step_gradient(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), program, model, guide, outcome)
            with torch.no_grad():
                trace = guide_trace(guide, outcome)
            weight = float(sum(trace.nodes[n]["log_prob"] for n in program.latents).exp())
            for name in total:
                total[name] += weight * found[name]
    else:
        total = expected_gradient(program, make, 1)
    assert_same(total, exact_gradient(program))


def guide_trace(guide, outcome):
    with Force([outcome], {}):
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    return trace


def step_gradient(elbo, program, model, guide, outcome):
    fresh(program)
    with Force([outcome], {}):
        elbo.loss_and_grads(model, guide)
    return gradient()


FLAG = {"on": False}
SWITCH = False


class Holder:
    def __init__(self):
        self.flag = False
        self.count = 0
        self.items = [0]


def programs_that_change():
    """Yield (name, body, change): the site signature stays the same while the dependencies change."""
    holder = Holder()
    cell = False

    def by_closure(b, z, w):
        observe("x", b[2] * (z if cell else b[0]))

    def set_cell():
        nonlocal cell
        cell = True

    def by_attribute(b, z, w):
        observe("x", b[2] * (z if holder.flag else b[0]))

    def by_list(b, z, w):
        observe("x", b[2] * [b[0], z][holder.items[0]])

    def by_dict(b, z, w):
        observe("x", b[2] * (z if FLAG["on"] else b[0]))

    def by_global(b, z, w):
        observe("x", b[2] * (z if SWITCH else b[0]))

    def by_counter(b, z, w):
        holder.count += 1
        observe("x", b[2] * (z if holder.count % 2 else b[0]))

    def set_attribute():
        holder.flag = True

    def set_item():
        holder.items[0] = 1

    def set_dict():
        FLAG["on"] = True

    def set_global():
        global SWITCH
        SWITCH = True

    yield "closure", by_closure, set_cell
    yield "attribute", by_attribute, set_attribute
    yield "list", by_list, set_item
    yield "dict", by_dict, set_dict
    yield "global", by_global, set_global
    yield "counter", by_counter, lambda: None


@pytest.mark.parametrize(
    ("name", "body", "change"), list(programs_that_change()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_program_that_changes_under_the_same_sites(name, body, change):
    """What was found before the change is not used after it: the gradient is that of a new ELBO."""
    program = case(body)
    model, guide = program.build(HOST)
    kept = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    outcome = {"z": np.array(1), "w": np.array(0)}
    for _ in range(6):
        step_gradient(kept, program, model, guide, outcome)
    change()
    for _ in range(5):
        # One step each of the kept and of a new ELBO, at the same counter parity.
        found = step_gradient(kept, program, model, guide, outcome)
        if name == "counter":
            step_gradient(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), program, model, guide, outcome)
            continue
        assert_same(
            found, step_gradient(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), program, model, guide, outcome)
        )


def test_a_counter_that_alternates_dependencies():
    """With a counter that the program itself moves, every step is laid out for that step."""
    holder = Holder()

    def body(b, z, w):
        holder.count += 1
        observe("x", b[2] * (z if holder.count % 2 else b[0]))

    program = case(body)
    model, guide = program.build(HOST)
    kept = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    outcome = {"z": np.array(1), "w": np.array(0)}
    for i in range(8):
        holder.count = i
        found = step_gradient(kept, program, model, guide, outcome)
        holder.count = i
        wanted = step_gradient(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), program, model, guide, outcome)
        assert_same(found, wanted)


def test_python_arguments_are_part_of_the_structure():
    def model(use):
        b = pyro.param("b", array([0.3, -0.8, 1.1]))
        z = bern("z", b[0])
        observe("x", b[2] * (z if use else b[1]))

    def guide(use):
        bern("z", pyro.param("a", array(0.4)))

    kept = TraceGrad_ELBO(estimators={"*": ScoreFunction()})

    def grad(elbo, use):
        pyro.clear_param_store()
        with Force([{"z": np.array(1)}], {}):
            elbo.loss_and_grads(model, guide, use)
        return gradient()

    for use in [False, False, False, True, False, True]:
        assert_same(grad(kept, use), grad(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), use))


def test_a_static_program_is_watched_twice_and_then_now_and_again(monkeypatch):
    program = case(lambda b, z, w: observe("x", b[2] * z))
    model, guide = program.build(HOST)
    fresh(program)
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    made = []
    monkeypatch.setattr("pplgrad.pyro._running.Provenance", lambda given: made.append(1) or Provenance(given))
    watched = []
    for _ in range(20):
        elbo.loss_and_grads(model, guide)
        watched.append(len(made))
    # Twice to find the structure, and then at its second, fourth, eighth and sixteenth use.
    assert [step for step in range(20) if watched[step] > (watched[step - 1] if step else 0)] == [0, 1, 3, 5, 9, 17]


def test_sites_that_come_and_go_without_a_trace_in_the_values():
    """A run whose sites differ from those found is laid out as if all depended on all, and stays exact."""
    toggle = itertools.cycle([True, True, True, False, False, True, False])

    def build(_):
        def model(flip):
            b = pyro.param("b", array([0.3, -0.8, 1.1]))
            z = bern("z", b[0])
            observe("x", b[2] * z)
            if flip.on:
                observe("extra", b[1] * z)

        def guide(flip):
            bern("z", pyro.param("a", array(0.4)))

        return model, guide

    class Opaque:
        __slots__ = ("on",)

    model, guide = build(None)
    flip = Opaque()
    kept = TraceGrad_ELBO(estimators={"*": ScoreFunction()})

    def grad(elbo):
        pyro.clear_param_store()
        with Force([{"z": np.array(1)}], {}):
            elbo.loss_and_grads(model, guide, flip)
        return gradient()

    for _ in range(14):
        flip.on = next(toggle)
        assert_same(grad(kept), grad(TraceGrad_ELBO(estimators={"*": ScoreFunction()})))


def test_an_object_among_the_arguments_is_watched():
    """A batch object with a flag: its change is seen, and without a change the structure is used again."""
    holder = Holder()

    def model(batch):
        b = pyro.param("b", array([0.3, -0.8, 1.1]))
        z = bern("z", b[0])
        observe("x", b[2] * (z if batch.flag else b[1]))

    def guide(batch):
        bern("z", pyro.param("a", array(0.4)))

    kept = TraceGrad_ELBO(estimators={"*": ScoreFunction()})

    def grad(elbo):
        pyro.clear_param_store()
        with Force([{"z": np.array(1)}], {}):
            elbo.loss_and_grads(model, guide, holder)
        return gradient()

    for step in range(8):
        holder.flag = step > 4
        assert_same(grad(kept), grad(TraceGrad_ELBO(estimators={"*": ScoreFunction()})))
        (structure,) = kept._structures._known.values()
        if step in (2, 4, 7):
            assert not structure.following


def test_leave_one_out_over_particles_of_different_structure():
    """Looped particles may have different sites: the expected gradient over all pairs of outcomes is exact."""

    def model():
        b = pyro.param("b", array([0.3, -0.8, 1.1]))
        z = bern("z", b[0])
        if z.item() == 1:
            w = bern("w", b[1])
            observe("x", b[2] * w)
        else:
            observe("y", b[2])

    def guide():
        a = pyro.param("a", array([0.4, -0.2]))
        z = bern("z", a[0])
        if z.item() == 1:
            bern("w", a[1])

    params = {"a": np.array([0.4, -0.2]), "b": np.array([0.3, -0.8, 1.1])}
    program = Case("inline", params, {}, lambda _: (model, guide))
    every = [{"z": np.array(0)}, {"z": np.array(1), "w": np.array(0)}, {"z": np.array(1), "w": np.array(1)}]

    def log_densities(outcome):
        with Force([outcome], {}):
            guide_trace = poutine.trace(guide).get_trace()
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        return guide_trace.log_prob_sum(), model_trace.log_prob_sum()

    fresh(program)
    pairs = [log_densities(outcome) for outcome in every]
    sum(-q.exp() * (p - q) for q, p in pairs).backward()
    wanted = gradient()
    weights = [float(q.detach().exp()) for q, _ in pairs]
    elbo = TraceGrad_ELBO(2)
    total = {name: np.zeros(value.shape) for name, value in params.items()}
    for i, j in itertools.product(range(3), repeat=2):
        fresh(program)
        with Force([every[i], every[j]], {}) as force:
            # Sites of different particles are told apart by their visits; w is only visited where z is 1.
            force.outcomes = [every[i], every[j]]
            force.visits["w"] = 1 if i == 0 else 0
            elbo.loss_and_grads(model, guide)
        found = gradient()
        for name in total:
            total[name] += weights[i] * weights[j] * found[name]
    assert_same(total, wanted)


def test_guard_refuses_what_it_cannot_watch():
    numbers = iter(range(3))
    assert Guard.of(lambda: next(numbers)) is None
    assert Guard.of(lambda: random.random()) is None
    assert Guard.of(lambda: np.random.rand()) is None
    assert Guard.of(lambda: torch.rand(1)) is not None


@pytest.mark.parametrize("whole", [True, False], ids=["whole numbers", "mask"])
def test_an_index_leaves_the_tensors_only_if_its_shape_can_change(whole):
    """A minibatch picked by index has one shape, and its structure is used again; one picked by a mask has not."""
    data = torch.arange(6.0)

    def model():
        b = pyro.param("b", array([0.3, -0.8, 1.1]))
        with pyro.plate("data", 6, subsample_size=3) as index:
            picked = data[index] if whole else data[torch.zeros(6).index_fill(0, index, 1.0) > 0]
            z = bern("z", b[0])
            pyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=picked)

    def guide():
        with pyro.plate("data", 6, subsample_size=3):
            bern("z", pyro.param("a", array(0.4)))

    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    for _ in range(5):
        elbo.loss_and_grads(model, guide)
    (structure,) = elbo._structures._known.values()
    assert structure.following == (not whole)
    assert (structure.read_at is None) == whole
