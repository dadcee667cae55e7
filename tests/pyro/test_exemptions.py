"""What is run where the modes do not see it leaves the same record as what they see: calls, constructors, draws and densities that are known."""

import copy
import gc
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad import PplgradError, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, _compat
from pplgrad.pyro._reuse.dependency_structure import Structure
from pplgrad.pyro._tracing import argument_checks, known_calls, known_densities, known_laws
from pplgrad.pyro._tracing import provenance as provenance_module
from pplgrad.pyro._tracing.operations import facts_of, is_view
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance
from pplgrad.testing.fuzz import random_program
from pplgrad.testing.fuzz.source import build
from pplgrad.testing.in_pyro import isolated


def found(model, guide, args=(), estimators=None, particles=1, vectorized=False):
    """Return what one watched step finds of a program, and its loss."""
    seen = []
    plain = Structure.layout

    def layout(self, traces, run, provenance, objective):
        result = plain(self, traces, run, provenance, objective)
        seen.append((result.sites, result.costs, self.misused, self.cut, self.lost, self.read_at, self.reusable))
        seen.append(
            (
                provenance.names(provenance.escaped_ever),
                provenance.hidden_draws,
                provenance.size_read,
                provenance.unfollowed_at,
            )
        )
        return result

    Structure.layout = layout
    pyro.set_rng_seed(7)
    try:
        elbo = TraceGrad_ELBO(
            particles, 3 if vectorized else float("inf"), vectorize_particles=vectorized, estimators=estimators
        )
        seen.append(elbo.loss_and_grads(model, guide, *args))
    except (PplgradError, ValueError) as error:
        seen.append(repr(error))
    finally:
        Structure.layout = plain
    return repr(copy.deepcopy(seen))


def same(step, monkeypatch):
    """Return what a step finds with the exemptions, which is what it finds without."""
    with_them = step()
    with monkeypatch.context() as patch:
        patch.setattr(_compat, "exempting", False)
        without = step()
    return with_them == without, with_them, without


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(5, 40))])
def test_random_programs_have_the_same_structure(seed, monkeypatch):
    program = random_program(seed)

    def step(score):
        built = build(program, "pyro")
        with isolated():
            pyro.clear_param_store()
            for name, value in program.params.items():
                pyro.param(name, torch.as_tensor(np.array(value)).clone())
            built.set_state(0)
            chosen = {site.name: ScoreFunction() for site in program.discrete} if score else None
            return found(built.model, built.guide, built.args, chosen)

    for score in (True, False):
        equal, one, other = same(lambda score=score: step(score), monkeypatch)
        assert equal, (one, other)


# Calls.

PLATES = [PlateAxis("plate", -1)]


def drawn(provenance, **kinds):
    z = provenance.tag("z", torch.tensor([0.25, 1.0, 0.75]), PLATES, **kinds)
    return z, provenance.tag("w", torch.tensor([1.0, 0.5, 0.25]), PLATES)


def arguments(z, w):
    """Return arguments that calls may have; not all calls take all of them."""
    whole = (4 * z).detach().long() if not z.requires_grad else torch.tensor([1, 2, 3])
    return [
        (z,),
        (z, w),
        (w, z),
        (z, 2.0),
        (z, 2),
        (2.0, z),
        (z[:, None], w),
        (z[:, None], w[:, None]),
        (z.sum(), w),
        (torch.ones(4, 1), z),
        (torch.nn.Parameter(torch.ones(3)), z),
        (whole, z),
        (whole,),
        (whole, 3),
        (z > 0.5, w > 0.5),
        (z, slice(0, 2)),
        (z, 1),
        (z, (None, slice(None, None, 2))),
        (z, (Ellipsis, None)),
        (z, 4, 3),
        (z[:, None], (3, 2)),
        (z[:, None], -1, 5),
        (z[1:], (2, 2)),
        (torch.zeros(2), z[:2]),
        ((2, 3),),
        (2, 3),
        (0.5,),
        ([1.0, 2.0],),
        (torch.tensor(2.0),),
        (z, torch.tensor([0, 2])),
        (z, torch.tensor(True)),
        ((3,), 0.5),
        (z[:0], w[:0]),
        (z.double(), w),
        (z.half(), w.half()),
        (z.to_sparse(), 2.0),
        (torch.complex(z, z), w),
    ]


def recorded(provenance, out):
    """Return what is known of what a call returned."""
    found = []
    for x in out if isinstance(out, (list, tuple)) else [out]:
        if isinstance(x, torch.Tensor):
            mixed = [
                [sorted(provenance.mixed(x, site, [("plate", axis)])) for axis in range(-x.dim(), 0)]
                if x.layout is torch.strided and x.dim()
                else None
                for site in "zw"
            ]
            known = provenance._known(x)
            names = provenance.names(provenance.of(x))
            found.append((names, mixed, provenance.cuts_of(x), known.relaxed, x.shape, provenance.is_random(x)))
    return found


MAKING = {torch.tensor, torch.zeros, torch.ones, torch.full}
KINDS = [{}, {"derived": True}, {"relaxed": True}]
CALLS = [func for func in known_calls.KNOWN_CALLS if func is not torch._C._set_grad_enabled]


def taken(func):
    """Return the numbers of the arguments that a call takes."""
    found = []
    for number, given in enumerate(arguments(torch.tensor([0.25, 1.0, 0.75]), torch.tensor([1.0, 0.5, 0.25]))):
        try:
            if isinstance(func(*given), (torch.Tensor, list, tuple)):
                found.append(number)
        except Exception:
            continue
    return found


def record_of(func, number, kinds, no_grad, exempting, monkeypatch):
    """Return what is found of one call."""
    monkeypatch.setattr(_compat, "exempting", exempting)
    with Provenance() as provenance:
        given = arguments(*drawn(provenance, **kinds))[number]
        with torch.set_grad_enabled(not no_grad):
            out = func(*given)
        with torch._C.DisableTorchFunction():
            return recorded(provenance, out), provenance.names(provenance.escaped), provenance.misused


def differing(func, monkeypatch):
    """Return the calls of which another record is left when they are exempted."""
    found = []
    for number in taken(func):
        for kinds, no_grad in (({}, False), *((kinds, no_grad) for kinds in KINDS[1:] for no_grad in (False, True))):
            one, other = (record_of(func, number, kinds, no_grad, x, monkeypatch) for x in (True, False))
            if one != other:
                found.append((func, number, kinds, no_grad, one, other))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("func", CALLS, ids=lambda func: f"{func.__qualname__}")
def test_a_known_call_reads_what_watching_finds(func, monkeypatch):
    assert taken(func) and differing(func, monkeypatch) == []


@pytest.mark.parametrize("func", CALLS, ids=lambda func: f"{func.__qualname__}")
def test_a_known_call_is_exempt_and_makes_one_operation_that_only_computes(func, monkeypatch):
    """Beside views it makes one, which draws nothing, reads nothing into Python, writes nothing, and cannot fail for its numbers."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    given = arguments(torch.tensor([0.25, 1.0, 0.75]), torch.tensor([1.0, 0.5, 0.25]))
    exempt = []
    watched = Provenance._dispatched
    monkeypatch.setattr(Provenance, "_dispatched", lambda *call: exempt.append(call[1]) or watched(*call))
    for number in taken(func):
        with Provenance():
            exempt.clear()
            func(*given[number])
        if exempt:
            continue
        with Seeing():
            seen.clear()
            func(*given[number])
        computing = [x for x in seen if not is_view(x) and x is not torch.ops.aten.lift_fresh.default]
        assert len(computing) <= 1
        for operation in computing if func not in MAKING else ():
            facts = facts_of(operation)._replace(lifts=False)
            assert not any(facts), (operation, facts)
        break
    else:
        pytest.fail("it is watched")


def test_the_checks_see_a_call_that_forgets_an_operand(monkeypatch):
    plain = Provenance.read
    monkeypatch.setattr(Provenance, "read", lambda self, tensors, smooth: plain(self, tensors[:1], smooth))
    assert differing(torch.Tensor.mul, monkeypatch)


def test_the_checks_see_a_call_that_loses_or_keeps_axes(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(provenance_module, "lined_up", lambda shape, out: [-1] * len(out))
        assert differing(torch.Tensor.mul, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(provenance_module, "lined_up", lambda shape, out: [*range(len(shape)), -1, -1][: len(out)])
        assert differing(torch.Tensor.mul, monkeypatch)


def test_the_checks_see_a_call_that_cuts_a_derivative_unseen(monkeypatch):
    def read(self, tensors, keeps_slope):
        return self.of_these(tensors)

    monkeypatch.setattr(Provenance, "read", read)
    assert differing(torch.Tensor.gt, monkeypatch) and differing(torch.Tensor.mul, monkeypatch)


class Steering(TorchFunctionMode):
    """Reads what calls return."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.mul:
            out.sum().item()
        return out


def steered_by_a_mode():
    with Steering(), Provenance() as provenance:
        z, _ = drawn(provenance)
        z * 2.0
        return provenance.names(provenance.escaped)


def steered_by_a_hook():
    def hook(x):
        x.sum().item()
        return x

    with Provenance() as provenance, torch.autograd.graph.saved_tensors_hooks(hook, hook):
        z, _ = drawn(provenance)
        z * torch.ones(3, requires_grad=True)
        return provenance.names(provenance.escaped)


@pytest.mark.parametrize("steer", [steered_by_a_mode, steered_by_a_hook])
def test_what_takes_part_in_a_call_is_watched(steer, monkeypatch):
    assert steer() == ["z"]
    monkeypatch.setattr(known_calls, "only_ours", lambda *functions: True)
    assert steer() == [], "the test sees it if nobody asks"


@pytest.mark.parametrize("change", ["autocast", "vmap", "dispatch", "default device", "dual"])
def test_a_call_is_watched_where_something_else_is_active(change, monkeypatch):
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    answers = []
    plain = known_calls.only_ours
    monkeypatch.setattr(known_calls, "only_ours", lambda *x: answers.append(plain(*x)) or answers[-1])
    around = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "dispatch": Other,
        "dual": torch.autograd.forward_ad.dual_level,
    }.get(change, nullcontext)
    with torch.device("cpu") if change == "default device" else nullcontext(), Provenance() as provenance, around():
        z, _ = drawn(provenance)
        if change == "vmap":
            torch.vmap(lambda x: torch.ones(2) * 2.0 * x)(z)
        else:
            z * 2.0
    # What `vmap` does before it wraps anything is a call like any other.
    assert answers and not any(answers[2:] if change == "vmap" else answers)


# Constructors and draws.

LAWS = {
    "logits": lambda z: dist.Bernoulli(logits=z - 0.5),
    "probs": lambda z: dist.Bernoulli(0.5 * z),
    "numbers": lambda z: dist.Bernoulli(logits=0.3),
    "normal": lambda z: dist.Normal(z, 2.0),
    "normal of two": lambda z: dist.Normal(z[:, None], scale=1.0 + z),
    "normal of numbers": lambda z: dist.Normal(0.0, 1.0, validate_args=False),
    "event": lambda z: dist.Bernoulli(logits=z[:, None] * torch.ones(2)).to_event(1),
    "expanded": lambda z: dist.Bernoulli(logits=z).expand([2, 3]),
    "categorical": lambda z: dist.Categorical(logits=torch.stack([z, 1 - z], -1)),
    "mixed": lambda z: dist.Bernoulli(logits=z.sum() * torch.ones(3)),
}


def law_of(name, kinds, exempting, monkeypatch, caught=False):
    """Return what is found of a distribution, of what it holds, and of a draw; `caught` says whether errors would be caught."""
    monkeypatch.setattr(_compat, "exempting", exempting)
    for module in (provenance_module, argument_checks, known_laws, known_densities):
        monkeypatch.setattr(module, "may_be_caught", lambda *skipped: caught)
    torch.manual_seed(3)
    with Provenance() as provenance:
        z, _ = drawn(provenance, **kinds)
        law = LAWS[name](z)
        provenance.drawing = True
        value = known_densities.draw(law)
        value = law() if value is None else value
        inner = getattr(law, "base_dist", law)
        with torch._C.DisableTorchFunction():
            found = [recorded(provenance, x) for x in vars(inner).values() if isinstance(x, torch.Tensor)]
            escaped = provenance.names(provenance.escaped)
            drawn_from = recorded(provenance, value)
        return found, drawn_from, value.tolist(), escaped, provenance.hidden_draws


@pytest.mark.grid
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("caught", [False, True])
def test_a_known_law_holds_and_draws_what_watching_finds(name, kinds, caught, monkeypatch):
    one, other = (law_of(name, kinds, exempting, monkeypatch, caught) for exempting in (True, False))
    assert one == other


def test_the_checks_see_a_law_whose_checks_may_be_caught_unasked(monkeypatch):
    assert law_of("logits", {}, True, monkeypatch)[3] != law_of("logits", {}, False, monkeypatch, True)[3]


def test_the_checks_see_a_law_whose_parameter_is_forgotten(monkeypatch):
    plain = Provenance.result

    def result(self, out, read, bits):
        plain(self, out, read, bits & 1)

    monkeypatch.setattr(Provenance, "result", result)
    assert law_of("logits", {}, True, monkeypatch) != law_of("logits", {}, False, monkeypatch)


def reading(plain):
    """Return a method in the place of one of the host's, which reads a parameter."""

    def method(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        vars(self)["logits"].sum().item()
        return out

    return method


PATCHED = [
    (torch.distributions.Bernoulli, "__init__"),
    (dist.Bernoulli, "__init__"),
    (torch.distributions.Bernoulli, "sample"),
    (dist.Bernoulli, "sample"),
    (dist.Bernoulli, "__call__"),
    (dist.Bernoulli, "_extended_shape"),
    (torch.distributions.Distribution, "_extended_shape"),
    (dist.torch_distribution.TorchDistributionMixin, "__call__"),
]


@pytest.mark.parametrize(("law", "name"), PATCHED)
def test_another_method_in_the_place_of_the_hosts_is_watched(law, name, monkeypatch):
    monkeypatch.setattr(law, name, reading(getattr(law, name)))
    assert law_of("logits", {}, True, monkeypatch)[3] == ["z"]
    with monkeypatch.context() as patch:
        patch.setattr(known_laws, "_is_as_known", lambda cls: True)
        patch.setattr(known_densities, "_is_as_known", lambda fn, law: True)
        assert law_of("logits", {}, True, monkeypatch)[3] == [], "the test sees it if nobody asks"


def test_a_method_of_a_single_law_is_watched(monkeypatch):
    with Provenance() as provenance:
        z, _ = drawn(provenance)
        law = dist.Bernoulli(logits=z)
        law.sample = lambda shape: law.logits * z.sum().item()
        assert known_densities.draw(law) is None


def test_a_subclass_is_watched():
    class Mine(dist.Bernoulli):
        def __init__(self, logits):
            super().__init__(logits=logits * float(logits.sum()))

    with Provenance() as provenance:
        Mine(drawn(provenance)[0])
        assert provenance.names(provenance.escaped) == ["z"]


def test_a_draw_is_left_to_a_handler_further_out():
    """It gives the site another value, and no random number is used."""
    seen = []

    def program():
        seen.append(pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.1)))))

    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, reuse_structure=False)
    with pyro.poutine.do(data={"none": torch.tensor(0.0)}), pyro.poutine.substitute(data={}):
        torch.manual_seed(1)
        elbo.loss_and_grads(program, program)
    torch.manual_seed(1)
    elbo.loss_and_grads(program, program)
    assert seen[0] == seen[2]


@pytest.mark.slow
def test_a_watched_step_leaves_nothing_to_the_collector():
    """What it knows of tensors, and the tensors, are freed when it ends."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.1))))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("b", torch.tensor(0.1))))

    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, reuse_structure=False)
    for _ in range(3):
        elbo.loss_and_grads(program, guide)
    gc.collect()
    gc.disable()
    try:
        elbo.loss_and_grads(program, guide)
        assert not any(isinstance(x, Provenance) for x in gc.get_objects())
    finally:
        gc.enable()
