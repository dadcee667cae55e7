"""Which axis of a result follows which of an operand: what a rule says is seen in numbers, one operation at a time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad.pyro._tracing import axes
from pplgrad.pyro._tracing.axes import NONE, Call, follows, rule_of, writes_undeclared
from pplgrad.pyro._tracing.operations import operands_of, places_written, tensors_in
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance
from tests.pyro import axis_calls
from tests.pyro.axis_calls import CALLS

# They draw as many numbers as it takes: their calls have parameters of which the draws are nearly sure.
LOOSE = {
    "poisson": 1e-3,
    "binomial": 1e-3,
    "_standard_gamma": 1e-3,
    "_sample_dirichlet": 1e-3,
    "mkldnn_rnn_layer": 1e-5,
}
# On GPUs alone, or views, or names that torch decomposes before they are seen.
UNTRIED = set(
    "cudnn_batch_norm _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention lift _conj _neg_view".split()
)
# Everything is mixed; `t_` has another shape by the time that provenance looks at its operand.
WITHOUT_AXES = set("dot vdot trace dist _is_all_true _is_any_true _pdist_forward t_".split())
# Deprecated, in beta, or with complex results of real operands.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def key_of(func):
    name = func._schema.name.removeprefix("aten::")
    return name if name in axes._RULES else name.removesuffix("_")


def others(x, axis, index):
    """Yield tensors with the same elements at an index along an axis, and elsewhere elements from other places of the same tensor."""
    rolled = x.roll(1, axis)
    shuffled = x.flatten()[torch.randperm(x.numel())].view(x.shape)
    for other in (rolled, shuffled):
        other.select(axis, index).copy_(x.select(axis, index))
        yield other


def agree(x, y, tolerance):
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    within = max(tolerance, 1e-5 if x.dtype in (torch.float32, torch.complex64) else 1e-9)
    return torch.allclose(x, y, rtol=within, atol=within, equal_nan=True)


class Checking(TorchDispatchMode):
    """Compares what is said of each operation that runs with what becomes of its result when other elements change."""

    def __init__(self):
        super().__init__()
        self.tried, self.claimed, self.wrong, self.unsaid = set(), set(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if rule_of(func) is not None and func._schema.returns:
            self.tried.add(key_of(func))
            with torch.random.fork_rng(devices=[]):
                self._check(func, args, kwargs)
        before = [x.clone() for _, x in operands_of(func, args, kwargs)]
        out = func(*args, **kwargs)
        said = [place for place, _ in places_written(func)]
        for (place, x), old in zip(operands_of(func, args, kwargs), before, strict=True):
            if place not in said and not agree(x, old, 0.0):
                self.unsaid.add(func)
        return out

    def _check(self, func, args, kwargs):
        call = Call(func, args, kwargs)
        first = run(func, args, kwargs)
        for number, (place, x) in enumerate(operands_of(func, args, kwargs)):
            for result, out in enumerate(first):
                for axis, follow in enumerate(follows(call, x, place, out) or []):
                    if follow != NONE and out.numel():
                        self._compare(call, (number, x, follow), first, (result, axis))

    def _compare(self, call, operand, first, place):
        number, x, follow = operand
        result, axis = place
        name = key_of(call.func)
        self.claimed.add(name)
        for index in {0, x.shape[follow] - 1}:
            for other in others(x, follow, index):
                try:
                    found = run(call.func, call.args, call.kwargs, {number: other})[result]
                except (RuntimeError, IndexError):  # These elements are no arguments of it.
                    continue
                own, now = first[result].select(axis, index), found.select(axis, index)
                if not agree(own, now, LOOSE.get(name, 0.0)):
                    self.wrong.append((name, number, follow, axis))
                    return


def run(func, args, kwargs, other=None):
    """Return what an operation makes of copies of its operands, one of them another, and what it writes into."""
    other, count = other or {}, iter(range(1000))

    def copied(tree):
        if isinstance(tree, torch.Tensor):
            return other.get(next(count), tree).detach().clone()
        return type(tree)(copied(item) for item in tree) if isinstance(tree, (list, tuple)) else tree

    args = [copied(arg) for arg in args]
    kwargs = {name: copied(arg) if name != "out" else arg for name, arg in kwargs.items()}
    torch.default_generator.manual_seed(0)  # Quicker than torch.manual_seed, which notes where it was called.
    made = func(*args, **kwargs)
    written = [args[place] for place, _ in places_written(func) if place < len(args)]
    return [x.detach().clone() for x in tensors_in([made, written])]


def checked(names=CALLS, inference=False):
    with torch.inference_mode(inference), torch.no_grad(), Checking() as checking:
        for name in names:
            torch.default_generator.manual_seed(0)
            CALLS[name]()
    return checking


@pytest.mark.slow
def test_no_axis_is_said_to_be_followed_where_it_is_not():
    """What is followed is followed in truth, every rule is tried, and says something."""
    # In inference mode operations are seen that torch otherwise decomposes.
    plain, inference = checked(), checked(inference=True)
    assert plain.wrong + inference.wrong == []
    assert all(writes_undeclared(func) for func in plain.unsaid | inference.unsaid) and plain.unsaid
    tried, claimed = plain.tried | inference.tried, plain.claimed | inference.claimed
    assert set(axes._RULES) - tried == UNTRIED
    assert tried & set(axes._RULES) - claimed == WITHOUT_AXES


@pytest.mark.slow
def test_no_axis_is_taken_for_another_of_its_size(monkeypatch):
    monkeypatch.setattr(axis_calls, "SAME", 3)
    ran = 0
    # A view in place has its operand's axes in their new places by the time that provenance looks: see below.
    for name in set(CALLS) - {"unsqueeze_"}:
        try:
            assert checked([name]).wrong == []
            ran += 1
        except (RuntimeError, IndexError, ValueError):  # It needs sizes of its own.
            continue
    assert ran > 200


def arguments(func):
    """Yield an operation's arguments by its schema: tensors of different shapes, and plain numbers."""
    shapes = iter([(5, 3, 7), (3, 1), (7,), (5, 1, 7)])
    for argument in func._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value() or argument.kwarg_only:
            return
        yield (torch.rand(next(shapes)) if kind == "Tensor" else 1 if kind == "int" else 0.5)


def test_what_torch_calls_pointwise_is():
    checking, ran = Checking(), 0
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        func = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if not name.startswith("aten::") or torch.Tag.pointwise not in getattr(func, "tags", ()):
            continue
        try:
            with torch.no_grad(), checking:
                func(*arguments(func))
            ran += 1
        except (RuntimeError, NotImplementedError, TypeError):  # For whole numbers, or out= alone.
            continue
    assert checking.wrong == []
    assert ran > 200
    assert checking.claimed > set("add floor lerp".split())


def keeps_all(call, x, place, out):
    return [axis if axis < x.dim() else NONE for axis in range(out.dim())]


def at_the_right(call, x, place, out):
    lead = out.dim() - x.dim()
    return [axis - lead if axis >= lead else NONE for axis in range(out.dim())]


def known_moments(call, x, place, out):
    return keeps_all(call, x, place, out) if place == 0 else [NONE] * out.dim()


def vectors_as_matrices(call, x, place, out):
    return [axis if axis < x.dim() else NONE for axis in range(min(out.dim(), 2))]


MUTANTS = {
    **{
        name: keeps_all
        for name in "cumsum roll flip gather _softmax renorm linalg_qr _fft_c2c sort convolution".split()
    },
    **{
        name: keeps_all
        for name in "reflection_pad1d _scaled_dot_product_flash_attention_for_cpu _cdist_forward".split()
    },
    **{name: at_the_right for name in "isin bucketize index_add index_fill searchsorted mm linear addr".split()},
    **{name: at_the_right for name in "index_put index_select nll_loss_forward masked_scatter take".split()},
    "native_batch_norm": known_moments,
    "_linalg_solve_ex": vectors_as_matrices,
    "multinomial": keeps_all,
    "_sample_dirichlet": keeps_all,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_caught(name, monkeypatch):
    monkeypatch.setitem(axes._RULES, name, MUTANTS[name])
    rule_of.cache_clear()
    try:
        names = [call for call in CALLS if call.split()[0] == name]
        assert names and {wrong[0] for wrong in checked(names, name == "linear").wrong} == {name}
    finally:
        rule_of.cache_clear()


def test_it_is_followed_whatever_it_is_called():
    """A pointwise operation that writes in place; of two overloads of one name, one pointwise, the other a reduction."""
    x = torch.rand(5, 3)
    for func, args, wanted in (
        (torch.ops.aten.ge_.Tensor, (x, x), [0, 1]),
        (torch.ops.aten.max.other, (x, x), [0, 1]),
        (torch.ops.aten.floor_divide.default, (x, x), [0, 1]),
        (torch.ops.aten.maximum.default, (x, x), [0, 1]),
    ):
        assert follows(Call(func, args, {}), x, 0, x) == wanted
    assert list(follows(Call(torch.ops.aten.max.dim, (x, 1), {}), x, 0, x[:, 0])) == [0]


@pytest.mark.parametrize(
    "move, axis",
    [
        (lambda z: z, -2),
        (lambda z: z.t_(), -1),
        (lambda z: z.transpose_(0, 1), -1),
        (lambda z: z.unsqueeze_(2), -3),
        (lambda z: z.unsqueeze_(0).squeeze_(0), -2),
    ],
)
def test_an_axis_is_followed_through_views_in_place(move, axis):
    with Provenance() as provenance:
        moved = move(provenance.tag("z", torch.rand(5, 5), [PlateAxis("rows", -2)]))
        assert provenance.mixed(moved + 1, "z", [("rows", axis)]) == frozenset()
        elsewhere = [("rows", other) for other in range(-moved.dim(), 0) if other != axis]
        assert all(provenance.mixed(moved + 1, "z", [place]) for place in elsewhere)
